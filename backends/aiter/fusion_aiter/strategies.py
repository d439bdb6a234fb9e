"""AITER's strategies: one per pattern, with the requirements that its kernels do not check themselves.

A strategy's variants are the kernels with and without the norm as an output, each with AITER's choice of stages
and, if the user asks, in one stage.
"""

from __future__ import annotations

import itertools

import torch

from fusion_aiter.availability import ARCHITECTURES
from fusion_aiter.kernels import KERNELS, Kernel
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
    Present,
    Requirement,
    SameDType,
    Strategy,
    Variant,
    WorldSize,
)

HALVES = (torch.bfloat16, torch.float16)
WORLD_SIZES = (2, 4, 8)
"""AITER's constructor also takes 6; the fused kernels do not."""

LEAST_SCALE = 1 / (512 * 240)
"""The least scale of the quantisers in use, with float8_e4m3fnuz."""

UNTESTED = "no AMD GPU was at hand: tested against AITER's signatures and a model of its numerics"

EVERYWHERE, ASKED_FOR = Arch(*ARCHITECTURES), Arch(*LATE_GRAPHS)

SETTLED = {
    "": ("norm_dtype",),
    "token_fp8": ("norm_dtype", "fp8_max", "min_scale"),
    "group_fp8": ("norm_dtype", "fp8_max", "min_scale"),
    # it rounds ties away from zero; if the model rounds them to even, both codes are equally far from the value
    "mxfp4": ("norm_dtype", "ties"),
}
"""Quantisation → scalars that the operators do not take: `_requirements` fixes them, or they do not matter."""


def _requirements(kernel: Kernel) -> tuple[Requirement, ...]:
    """The requirements of every variant."""
    found: list[Requirement] = [
        WorldSize(*WORLD_SIZES),
        DType("x", *HALVES, *(() if kernel.quantization else (torch.float32,))),
    ]
    if not kernel.norms:
        return (*found, EVERYWHERE, MultipleOf("x", dim=-1, of=8))
    # the kernels read every tensor as x's dtype; another dtype gives garbage without an error (vLLM#48324)
    found.append(SameDType("x", *("residual",) * kernel.adds, "weight", "normed", kernel.outputs[-1]))
    found.append(Present("weight"))
    if kernel.adds:
        found.append(DTypeAttribute("residual_dtype", "x"))
    if not kernel.quantization:  # with one, the norm is in float32 unless it is read
        found.append(DTypeAttribute("norm_dtype", "x"))
    if kernel.gemma:
        found.append(Attribute("weight_bias", 0.0, 1.0))
    if kernel.quantization.endswith("fp8"):
        found += [NativeFP8(), LeastScale(LEAST_SCALE)]
    if kernel.quantization == "group_fp8":
        found.append(GroupSize("x"))
    return tuple(found)


def _variant(kernel: Kernel, *, one_stage: bool) -> Variant:
    option = "one_stage" if one_stage else None
    return Variant(
        name="_".join(filter(None, ("out" if kernel.norm_out else "", option))),
        arguments={"one_stage": True} if one_stage else {},
        requires=(ASKED_FOR if one_stage else EVERYWHERE, RowFits("x", kernel, one_stage)),
        outputs=kernel.outputs,
        impl=operator(kernel),
        # what the user switched on comes first; then without the norm's output before with it
        rank=2 * one_stage - kernel.norm_out,
        option=option,
    )


def _strategy(pattern: str, kernels: tuple[Kernel, ...]) -> Strategy:
    kernel = kernels[0]
    settled = ("residual_dtype",) * kernel.adds + SETTLED[kernel.quantization]
    return Strategy(
        pattern=pattern,
        name=f"aiter.{pattern}",
        impl=operator(kernel),
        requires=_requirements(kernel),
        worthwhile=(KnownFaster("x", SIZES, "as AITER's own callers have it"),),
        outputs=kernel.outputs,
        untested=UNTESTED,
        settled=settled if kernel.norms else (),
        # AITER's bare all_reduce chooses its stages by itself
        variants=tuple(_variant(each, one_stage=flag) for each in kernels for flag in (False, True))
        if kernel.norms
        else (),
    )


STRATEGIES = tuple(
    _strategy(pattern, tuple(kernels)) for pattern, kernels in itertools.groupby(KERNELS, lambda each: each.pattern)
)
