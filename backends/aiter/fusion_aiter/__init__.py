"""AITER on AMD GPUs: whether it can be used here. Its strategies are not written yet."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from fusion_core import Device, Reason, hookimpl

ARCHITECTURES = ("gfx942", "gfx950")
"""GPUs that AITER supports (its README); its gfx1250 build has no fused all-reduce."""

MARKERS = ("dist/device_communicators/custom_all_reduce.py", "jit/core.py")
"""Files that AMD's package has and the unrelated package of the same name does not."""


@hookimpl
def fusion_available(device: Device) -> Iterator[Reason]:
    """Why AITER cannot be used on a device. Looks for its files; without ROCm its import raises."""
    if not torch.version.hip:
        yield Reason("platform", "this torch is not built for ROCm", "a ROCm build")
    elif device.type != "cuda" or device.arch not in ARCHITECTURES:
        yield Reason("arch", f"device is {device}", " or ".join(ARCHITECTURES))
    spec = find_spec("aiter")
    if spec is None:
        yield Reason(
            "not_installed", "aiter is not installed", "AMD's aiter", hint="see ROCm/aiter for how to build it"
        )
    elif not any(
        all((Path(place) / marker).is_file() for marker in MARKERS) for place in spec.submodule_search_locations or ()
    ):
        yield Reason(
            "wrong_package",
            f"aiter at {spec.origin} is not AMD's",
            "AMD's aiter",
            hint="uninstall the package named aiter, it is unrelated",
        )
