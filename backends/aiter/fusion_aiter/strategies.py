"""AITER's strategies: one for each kernel, with all that the kernel does not check itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_aiter.availability import ARCHITECTURES
from fusion_aiter.kernels import KERNELS, Form, Kernel
from fusion_aiter.limits import SIZES
from fusion_aiter.ops import operator
from fusion_aiter.requirements import GroupSize, LeastScale, NativeFP8, RowFits
from fusion_aiter.stages import LATE_GRAPHS
from fusion_core import (
    Arch,
    Attribute,
    DType,
    DTypeAttribute,
    KnownFaster,
    MultipleOf,
    Requirement,
    SameDType,
    Strategy,
    WorldSize,
)

HALVES = (torch.bfloat16, torch.float16)
WORLD_SIZES = (2, 4, 8)
"""The constructor takes 6 too; the fused kernels do not."""

LEAST_SCALE = 1 / (512 * 240)
"""The least scale that quantisers in use have, with float8_e4m3fnuz."""

UNTESTED = "no AMD GPU was at hand: tested against AITER's signatures and a model of its numerics"


def _implementation(kernel: Kernel, *, one_stage: bool) -> Callable[..., Any]:
    """The operator with the pattern's parameters by name. What requirements have settled is not passed on."""
    op = operator(kernel)

    if not kernel.norms:

        def all_reduce(x: Tensor, *, group: str, max_tokens: int | None = None) -> Any:
            return op(x, group, max_tokens, one_stage)

        return all_reduce

    def run(x: Tensor, residual: Tensor | None, weight: Tensor, values: tuple[Any, ...], *where: Any) -> Any:
        tensors = (x, weight) if residual is None else (x, residual, weight)
        return op(*tensors, *values, *where, one_stage)

    if not kernel.quantization:

        def norm(
            x: Tensor,
            weight: Tensor,
            eps: float,
            *,
            residual: Tensor | None = None,
            weight_bias: float = 0.0,
            residual_dtype: torch.dtype | None = None,
            norm_dtype: torch.dtype | None = None,
            group: str,
            max_tokens: int | None = None,
        ) -> Any:
            return run(x, residual, weight, (eps, weight_bias), group, max_tokens)

        return norm

    if kernel.quantization == "token_fp8":

        def token_fp8(
            x: Tensor,
            weight: Tensor,
            eps: float,
            *,
            residual: Tensor | None = None,
            weight_bias: float = 0.0,
            residual_dtype: torch.dtype | None = None,
            norm_dtype: torch.dtype | None = None,
            fp8_dtype: torch.dtype = Form.fp8_dtype,
            fp8_max: float | None = None,
            min_scale: float | None = None,
            group: str,
            max_tokens: int | None = None,
        ) -> Any:
            return run(x, residual, weight, (eps, weight_bias, fp8_dtype), group, max_tokens)

        return token_fp8

    # without a bias of the weight: the kernels that quantise by groups have none
    if kernel.quantization == "group_fp8":

        def group_fp8(
            x: Tensor,
            weight: Tensor,
            eps: float,
            *,
            residual: Tensor | None = None,
            residual_dtype: torch.dtype | None = None,
            norm_dtype: torch.dtype | None = None,
            group_size: int = Form.group_size,
            fp8_dtype: torch.dtype = Form.fp8_dtype,
            fp8_max: float | None = None,
            min_scale: float | None = None,
            scale_layout: str = "row_major",
            group: str,
            max_tokens: int | None = None,
        ) -> Any:
            values = (eps, fp8_dtype, group_size, scale_layout == "column_major")
            return run(x, residual, weight, values, group, max_tokens)

        return group_fp8

    def mxfp4(
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        norm_dtype: torch.dtype | None = None,
        ties: str = "even",
        group: str,
        max_tokens: int | None = None,
    ) -> Any:
        # it rounds ties away from zero; where the model rounds them to even both codes are as far off
        return run(x, residual, weight, (eps,), group, max_tokens)

    return mxfp4


def _requirements(kernel: Kernel, *, one_stage: bool) -> tuple[Requirement, ...]:
    total = kernel.outputs[-1]
    found: list[Requirement] = [
        Arch(*(LATE_GRAPHS if one_stage else ARCHITECTURES)),
        WorldSize(*WORLD_SIZES),
        DType("x", *HALVES, *(() if kernel.quantization else (torch.float32,))),
    ]
    if not kernel.norms:
        return (*found, MultipleOf("x", dim=-1, of=8))
    # the kernels read every tensor in x's dtype; another one would be garbage without an error (vLLM#48324)
    found.append(SameDType("x", *("residual",) * kernel.adds, "weight", "normed", total))
    found.append(RowFits("x", kernel, one_stage))
    if kernel.adds:
        found.append(DTypeAttribute("residual_dtype", "x"))
    if not kernel.quantization:  # else it is in float32 there, until somebody reads it
        found.append(DTypeAttribute("norm_dtype", "x"))
    if kernel.gemma:
        found.append(Attribute("weight_bias", 0.0, 1.0))
    if kernel.quantization.endswith("fp8"):
        found += [NativeFP8(), LeastScale(LEAST_SCALE)]
    if kernel.quantization == "group_fp8":
        found.append(GroupSize("x"))
    return tuple(found)


def _strategies() -> tuple[Strategy, ...]:
    found = []
    for kernel in KERNELS:
        worthwhile = (KnownFaster("x", SIZES, "as AITER's own callers have it"),)
        # the plain one first; what the user switched on before it; without the norm's output before with it
        for option, rank in ((None, 0), ("one_stage", 2)):
            if option is not None and not kernel.norms:
                continue  # AITER's bare all_reduce chooses by itself
            found.append(
                Strategy(
                    pattern=kernel.pattern,
                    name=f"aiter.{kernel.name}" + (f"_{option}" if option else ""),
                    impl=_implementation(kernel, one_stage=option is not None),
                    requires=_requirements(kernel, one_stage=option is not None),
                    worthwhile=worthwhile,
                    outputs=kernel.outputs,
                    rank=rank - kernel.norm_out,
                    option=option,
                    untested=UNTESTED,
                )
            )
    return tuple(found)


STRATEGIES = _strategies()
