"""A kernel over memory that the ranks of one host share, as a backend of fusion_core: only declarations."""

from collections.abc import Iterator

from torch import bfloat16, float32

from fusion_core import Device, DType, OnDevice, Present, SameDType, Status, Strategy, hookimpl
from fusion_shm.ops import OUTPUTS, all_reduce_add_rms_norm
from fusion_shm.workspaces import WORKSPACES

REQUIRES = (OnDevice("cpu"), DType("x", float32, bfloat16), SameDType("x", "residual", "weight"), Present("weight"))


@hookimpl
def fusion_strategies() -> list[Strategy]:
    name = "shm.all_reduce_add_rms_norm"
    return [Strategy("all_reduce_add_rms_norm", name, all_reduce_add_rms_norm, REQUIRES, outputs=OUTPUTS)]


@hookimpl
def fusion_status(device: Device) -> Iterator[Status]:
    yield from WORKSPACES.status()
