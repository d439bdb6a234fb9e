"""Whether FlashInfer can be used on a device, by what is installed, without importing it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version

from fusion_core import Device, Reason

CAPABILITIES = (9, 10, 12)
"""Major compute capabilities that FlashInfer builds its communication kernels for (flashinfer/jit/comm.py, 0.7.2)."""

MINIMUM = Version("0.7.2")
"""Earlier releases have a barrier in their two-shot kernel that can pass early (stale flags, fixed in 0.7.2), and
before 0.7.1 a kernel launched with PDL could read a stale residual (flashinfer#5081)."""

INSTALL = "pip install -U 'fusion-core[flashinfer]'"


def unavailable(device: Device) -> Iterator[Reason]:
    """The reasons why FlashInfer cannot be used on a device; none if it can."""
    if device.type != "cuda":
        yield Reason("device", f"device is {device}", "an NVIDIA GPU")
    elif torch.version.hip:
        yield Reason("platform", "this torch is built for ROCm", "a CUDA build")
    elif capability(device) not in CAPABILITIES:
        yield Reason("arch", f"device is {device}", "compute capability 9, 10 or 12")
    if _spec("flashinfer") is None:
        yield Reason("not_installed", "flashinfer is not installed", f"flashinfer-python >= {MINIMUM}", hint=INSTALL)
        return
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        yield Reason(
            "version",
            "flashinfer has no metadata of flashinfer-python",
            f"flashinfer-python >= {MINIMUM}",
            hint=INSTALL,
        )
        return
    if not _is_new_enough(found):
        yield Reason("version", f"flashinfer-python is {found}", f"{MINIMUM} or later", hint=INSTALL)
    for module, distribution in (("tvm_ffi", "apache-tvm-ffi"), ("cuda.bindings", "cuda-bindings")):
        if _spec(module) is None:
            yield Reason(
                "not_installed",
                f"{distribution} is not installed, which flashinfer.comm imports",
                distribution,
                hint=f"pip install {distribution}",
            )


def capability(device: Device) -> int:
    """The major compute capability; 0 if the device is not an NVIDIA GPU."""
    found = re.fullmatch(r"sm_(\d+)\d[a-z]?", device.arch)
    return int(found[1]) if found else 0


def multicast_off() -> str | None:
    """The environment setting that switches NVLink multicast off, for any library; None if there is none.

    Users set it on machines where multicast is broken or shared. FlashInfer reads none of these settings.
    """
    if os.environ.get("NCCL_NVLS_ENABLE") == "0":
        return "NCCL_NVLS_ENABLE=0"
    if (value := os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0")) not in ("", "0"):
        return f"TORCH_SYMM_MEM_DISABLE_MULTICAST={value}"
    return "NVSHMEM_DISABLE_NVLS=1" if os.environ.get("NVSHMEM_DISABLE_NVLS") == "1" else None


@functools.cache
def pattern_codes() -> dict[str, int] | None:
    """FlashInfer's names of fused patterns → their codes, read from its source; None if it is not installed."""
    spec = _spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(next(iter(spec.submodule_search_locations)), "comm", "trtllm_ar.py")
    try:
        text = source.read_text(encoding="utf-8")
    except OSError:
        return {}
    _, _, body = text.partition("class AllReduceFusionPattern")
    body, _, _ = body.partition("\nclass ")
    return {name: int(code) for name, code in re.findall(r"^    (k\w+) = (\d+)$", body, re.MULTILINE)}


def _spec(module: str) -> ModuleSpec | None:
    try:
        return find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None


def _is_new_enough(version: str) -> bool:
    try:
        return Version(version) >= MINIMUM
    except InvalidVersion:  # a custom build, whose contents are unknown
        return False
