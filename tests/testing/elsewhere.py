"""A vendor's backend on a machine without its device: its kernel cannot even be called here."""

import torch

from fusion_core import (
    Arch,
    Attribute,
    Contiguous,
    Device,
    Dimensions,
    DType,
    MultipleOf,
    OnDevice,
    Reason,
    SameDType,
    SizeBetween,
    WorldSize,
    hookimpl,
)
from tests.testing.one_strategy import Results, backend, operator


@hookimpl
def _no_hardware(device: Device) -> list[Reason]:
    return [] if device.arch == "acme1" else [Reason("device", f"device is {device}", "an Acme 1")]


def _never_runs(x, residual, weight, eps, group) -> Results:
    raise AssertionError("a kernel ran without its device")


ELSEWHERE = (
    OnDevice("cuda"),
    Arch("acme1"),
    WorldSize(4, 8),
    Dimensions("x", 2),
    DType("x", torch.bfloat16, torch.float16),
    SameDType("x", "residual", "weight", "normed"),
    MultipleOf("x", -1, 128),
    SizeBetween("x", -1, 512, 16384),
    Contiguous("x"),
    Contiguous("residual"),
    Attribute("weight_bias", 0.0),
)
runs_elsewhere = backend(
    operator("elsewhere", _never_runs, lambda *outputs: outputs),
    requires=ELSEWHERE,
    worthwhile=(SizeBetween("x", 0, 1, 256),),
)
runs_elsewhere.fusion_available = _no_hardware
