"""A description of this machine for reports, as plain JSON types."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from fusion_core.errors import BackendError
from fusion_core.plugins.registry import Registry
from fusion_core.site import Device
from fusion_core.tables.machine import installed_versions

SETTINGS = ("FUSION_CORE_", "AITER_", "FLASHINFER_", "NCCL_", "TORCH_SYMM_MEM_", "PYTORCH_", "HSA_", "HIP_", "ROCR_")
"""Prefixes of the environment variables that kernels and their libraries read."""


def machine() -> dict[str, Any]:
    """This machine's GPUs, versions and settings."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{gpu.name} ({Device.of(torch.device('cuda', index)).arch})" for index, gpu in enumerate(gpus)]
    return {
        "device": str(Device.here()),
        "gpus": names,
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "versions": installed_versions(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


def held(registry: Registry, backend: str, device: Device) -> Iterator[dict[str, Any]]:
    """The memory that a backend holds; if its status raises, one row with the error."""
    try:
        for status in registry.status(backend, device):
            yield {"backend": backend, **dataclasses.asdict(status)}
    except BackendError as error:
        yield {"backend": backend, "subject": "", "memory": None, "state": str(error)}
