"""FlashInfer on NVIDIA GPUs: whether it can be used here. Its strategies are not written yet."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from fusion_core import Device, Reason, hookimpl

ARCHITECTURES = (9, 10, 12)
"""Major compute capabilities that FlashInfer builds its communication kernels for (flashinfer/jit/comm.py, 0.7.2)."""

MINIMUM = (0, 7, 2)
"""Earlier releases have a stale-flag barrier in their two-shot kernel (flashinfer#5081 and the notes of 0.7.2)."""


@hookimpl
def fusion_available(device: Device) -> Iterator[Reason]:
    """Why FlashInfer cannot be used on a device. Looks at the installed distribution and never imports it."""
    if device.type != "cuda":
        yield Reason("device", f"device is {device}", "an NVIDIA GPU")
    elif torch.version.hip:
        yield Reason("platform", "this torch is built for ROCm", "a CUDA build")
    elif not device.arch.startswith("sm_") or int(device.arch[3:]) // 10 not in ARCHITECTURES:
        yield Reason("arch", f"device is {device}", "compute capability 9, 10 or 12")
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        if find_spec("flashinfer") is None:
            yield Reason(
                "not_installed",
                "flashinfer is not installed",
                "flashinfer-python >= 0.7.2",
                hint="pip install 'fusion-core[flashinfer]'",
            )
        return
    if _release(found) < MINIMUM:
        yield Reason(
            "version",
            f"flashinfer-python is {found}",
            "0.7.2 or later",
            hint="pip install -U 'fusion-core[flashinfer]'",
        )


def _release(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
