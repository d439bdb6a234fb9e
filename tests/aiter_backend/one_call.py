"""One call of an operator over the model of AITER, compared with float64, and what the model has recorded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_aiter.kernels import KERNELS, Kernel
from fusion_aiter.requirements import FP8
from fusion_core import _cuda
from fusion_core.fallback import fallen_back
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary import all_reduce
from fusion_core.workspaces.self_check import distance, exactly

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
FUSED = {"all_reduce"} | {kernel.method for kernel in KERNELS}
GROUP_SIZE = 128

Spoil = Callable[[Tensor], Tensor]


def world() -> str:
    """The default group's name."""
    return str(dist.group.WORLD.group_name)


def inputs(kernel: Kernel, tokens: int, hidden: int, dtype: torch.dtype, rank: int) -> dict[str, Tensor]:
    """The tensors of a pattern, x different on every rank."""
    own, common = torch.Generator().manual_seed(rank + 7 * tokens), torch.Generator().manual_seed(tokens)
    found = {"x": torch.randn(tokens, hidden, generator=own).to(dtype)}
    if kernel.adds:
        found["residual"] = torch.randn(tokens, hidden, generator=common).to(dtype)
    if kernel.norms:
        found["weight"] = (torch.rand(hidden, generator=common) + 0.5).to(dtype)
    return found


def call(kernel: Kernel, tensors: dict[str, Tensor], group: str, *, bias: float = 0.0, transposed: bool = False,
         max_tokens: int | None = None, one_stage: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """The operator's results by name."""
    scalars: list[Any] = [1e-5] if kernel.norms else []
    scalars += [bias] if kernel.gemma else []
    if kernel.quantization.endswith("fp8"):
        scalars.append(FP8[os.environ["GPU_ARCHS"]])
    if kernel.quantization == "group_fp8":
        scalars += [GROUP_SIZE, "column_major" if transposed else "row_major"]
    operator = getattr(torch.ops.fusion_aiter, kernel.name)
    returned = operator(*tensors.values(), *scalars, group, max_tokens, one_stage)
    return dict(zip(kernel.outputs, returned if isinstance(returned, tuple) else (returned,), strict=True))


def run(name: str, tokens: int = 4, hidden: int = 512, dtype: torch.dtype = torch.bfloat16, *, group: str = "",
        lead: tuple[int, ...] | None = None, spoil: Spoil = lambda tensor: tensor, bias: float = 0.0, **flags: Any) -> float:  # fmt: skip
    """One call of an operator: its distance from float64, in units of what its dtypes allow: up to 1 is right."""
    kernel, group = BY_NAME[name], group or world()
    tensors = inputs(kernel, tokens, hidden, dtype, dist.distributed_c10d._resolve_process_group(group).rank())
    given = {
        key: spoil(value if lead is None or key == "weight" else value.view(*lead, hidden))
        for key, value in tensors.items()
    }
    results = call(kernel, given, group, bias=bias, **flags)
    for key, value in tensors.items():
        assert torch.equal(given[key].reshape(value.shape), value), f"{key} was written"
    if lead is not None:
        assert all(result.shape[:-1] == lead for result in results.values())
        results = {key: result.reshape(tokens, -1) for key, result in results.items()}
    scalars = {"eps": 1e-5} if kernel.norms else {}
    scalars |= {"weight_bias": bias} if kernel.gemma else {}
    scalars |= {"group_size": GROUP_SIZE} if kernel.quantization == "group_fp8" else {}
    pattern = PATTERNS[kernel.pattern]
    exact = exactly(pattern, all_reduce(tensors["x"].double(), group), tensors, scalars)
    return distance(pattern, results, exact, {**tensors, **scalars})


def runs_fused(name: str, *sizes: int, **given: Any) -> bool:
    """Whether such a call is fused, once all is made and checked; right it is anyway."""
    assert run(name, *sizes, **given) <= 1
    before = len(kernels())
    assert run(name, *sizes, **given) <= 1
    return len(kernels()) > before


def record() -> list[dict[str, Any]]:
    """What was called of AITER; see the model's ``calls``."""
    return sys.modules["aiter"].calls  # type: ignore[no-any-return]


def recorded(method: str) -> list[dict[str, Any]]:
    """The calls of one method."""
    return [each for each in record() if each["method"] == method]


def kernels(tokens: int | None = None) -> list[dict[str, Any]]:
    """The calls of kernels, or those of so many rows."""
    found = [each for each in record() if each["method"] in FUSED]
    return [each for each in found if tokens is None or each["kwargs"]["inp"]["shape"][0] == tokens]


def sizes_made() -> list[int]:
    """``max_size`` of each communicator that was made."""
    return [each["kwargs"]["max_size"] for each in recorded("__init__")]


def reasons(name: str, group: str = "") -> list[tuple[str, str]]:
    """(code, words) why a kernel's strategy runs unfused."""
    return [(reason.code, str(reason)) for reason in fallen_back(f"aiter.{name}", group or world())]


def captured() -> Any:
    """Inside, a CUDA graph is captured, as far as fusion-core can tell."""
    return mock.patch.object(_cuda, "is_capturing", return_value=True)


def communicator_class() -> Any:
    """The model's `CustomAllreduce`."""
    return sys.modules["aiter.dist.device_communicators.custom_all_reduce"].CustomAllreduce
