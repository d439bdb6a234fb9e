"""How the GPUs of this machine are linked, and their driver's version: what torch's public face does not tell."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch

UNKNOWN = "unknown"
SEVERAL_HOSTS = "several hosts"
AMD_DRIVER = Path("/sys/module/amdgpu/version")


def links_between(world_size: int) -> str:
    """How the GPUs of a process group are linked: ``"nvlink 18"`` for 18 NVLinks between any two of them.

    ``"nvlink 1 to 2"`` where pairs differ, ``"no nvlink"``, ``"several hosts"`` for more ranks than this one runs, and
    empty for one rank. ``"unknown"`` where it cannot be told: the process sees no other GPU than its own, or torch does
    not ask (ROCm).
    """
    if world_size == 1:
        return ""
    if _ranks_on_this_host() < world_size:
        return SEVERAL_HOSTS
    matrix = _nvlinks()
    if matrix is None or len(matrix) < 2:
        return UNKNOWN
    if len(matrix) < world_size:
        return SEVERAL_HOSTS
    counts = {count for row, line in enumerate(matrix) for column, count in enumerate(line) if row != column}
    if not any(counts):
        # torch also says 0 where it could not ask
        return "no nvlink" if driver_version() else UNKNOWN
    least, most = min(counts), max(counts)
    return f"nvlink {least}" if least == most else f"nvlink {least} to {most}"


def _ranks_on_this_host() -> float:
    """As the launcher says; infinite where it does not."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else float("inf")


def _nvlinks() -> Sequence[Sequence[int]] | None:
    """NVLinks from each visible GPU to each other one; None where torch cannot tell."""
    from torch._C import _distributed_c10d
    from torch._C._autograd import DeviceType

    # private, and missing from torch's stubs: whatever becomes of it must not stop a model
    try:
        matrix: Sequence[Sequence[int]] = _distributed_c10d._detect_dma_connectivity(  # type: ignore[attr-defined]
            DeviceType.CUDA, "nvlink"
        ).matrix
    except (AttributeError, RuntimeError, TypeError):
        return None
    return matrix


@functools.cache
def driver_version() -> str:
    """The version of the GPU's driver, such as ``"580.95.05"``; empty where it cannot be told."""
    if torch.version.hip:
        try:
            return AMD_DRIVER.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return ""
    return _nvidia_driver()


def _nvidia_driver() -> str:
    """From NVML, which comes with the driver: torch knows only the number of CUDA's interface."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return ""
    except (OSError, AttributeError):
        return ""
    text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
    nvml.nvmlShutdown()  # counted: torch's own use of it goes on
    return "" if failed else text.value.decode(errors="replace")
