"""The links between this machine's GPUs, and their driver's version: torch's public API has neither."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from fusion_core._torch.distributed import nvlinks

UNKNOWN = "unknown"
SEVERAL_HOSTS = "several hosts"
AMD_DRIVER = Path("/sys/module/amdgpu/version")


def links_between(world_size: int) -> str:
    """The links between a process group's GPUs: ``"nvlink 18"`` for 18 NVLinks between any two of them.

    ``"nvlink 1 to 2"`` if pairs differ, ``"no nvlink"``, ``"several hosts"`` for more ranks than run on this host, and
    empty for one rank. ``"unknown"`` if the process sees only its own GPU, or if torch cannot find out (ROCm).
    """
    if world_size == 1:
        return ""
    if _ranks_on_this_host() < world_size:
        return SEVERAL_HOSTS
    matrix = nvlinks()
    if matrix is None or len(matrix) < 2:
        return UNKNOWN
    if len(matrix) < world_size:
        return SEVERAL_HOSTS
    counts = {count for row, line in enumerate(matrix) for column, count in enumerate(line) if row != column}
    if not any(counts):
        # torch also returns 0 if it could not ask the driver
        return "no nvlink" if driver_version() else UNKNOWN
    least, most = min(counts), max(counts)
    return f"nvlink {least}" if least == most else f"nvlink {least} to {most}"


def _ranks_on_this_host() -> float:
    """The number that the launcher sets; infinite if it sets none."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else float("inf")


@functools.cache
def driver_version() -> str:
    """The version of the GPU's driver, such as ``"580.95.05"``; empty if it is unknown."""
    if torch.version.hip:
        try:
            return AMD_DRIVER.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return ""
    return _nvidia_driver()


def _nvidia_driver() -> str:
    """The version from NVML, which is part of the driver: torch has only the version of CUDA's interface."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return ""
    except (OSError, AttributeError):
        return ""
    text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
    nvml.nvmlShutdown()  # reference-counted: torch can still use it
    return "" if failed else text.value.decode(errors="replace")
