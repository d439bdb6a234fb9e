"""FlashInfer's strategies: one for each kernel, with all that the kernel does not check itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_core import (
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
from fusion_flashinfer.kernels import KERNELS, Kernel
from fusion_flashinfer.limits import ONE_SHOT, TWO_SHOT
from fusion_flashinfer.ops import operator
from fusion_flashinfer.requirements import (
    FEWER_THREADS,
    Capability,
    KernelPresent,
    MoreRowsThanRanks,
    MulticastAllowed,
    OneCluster,
    OneLaunch,
    VectorForEachRank,
)

HALVES = (torch.bfloat16, torch.float16)
WORLD_SIZES = (2, 4, 8)
"""The kernels' template has 16 too, but FlashInfer's own rule for one-shot raises KeyError there."""

LEAST_SCALE = 1 / (512 * 448)
"""Of a dynamic FP8 scale: ``trtllm_allreduce_fusion.cuh``, and the default of `quantize_token_fp8`."""

UNTESTED_FP4 = "no GPU of compute capability 10 was at hand"
UNTESTED_MNNVL = "NVLink multicast was off on the machines at hand"


def _implementation(kernel: Kernel, *, pdl: bool, mnnvl: bool, two_shot: bool) -> Callable[..., Any]:
    """The operator with the pattern's parameters by name. What requirements have settled is not passed on."""
    op = operator(kernel)

    if not kernel.norms:

        def all_reduce(x: Tensor, *, group: str, max_tokens: int | None = None, numerics: str = "default") -> Any:
            return op(x, group, max_tokens, pdl, mnnvl, two_shot, numerics == "deterministic")

        return all_reduce

    def norm(
        x: Tensor,
        weight: Tensor,
        eps: float,
        *,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        global_scale: Tensor | None = None,
        weight_bias: float = 0.0,
        residual_dtype: torch.dtype | None = None,
        norm_dtype: torch.dtype | None = None,
        fp8_dtype: torch.dtype | None = None,
        fp8_max: float | None = None,
        min_scale: float | None = None,
        group_size: int = 128,
        scale_format: str = "",
        scale_layout: str = "",
        group: str,
        max_tokens: int | None = None,
    ) -> Any:
        tensors = [each for each in (residual, weight, scale, global_scale) if each is not None]
        options = {"group_fp8": (group_size,), "nvfp4": (scale_layout,)}.get(kernel.quantization, ())
        return op(x, *tensors, eps, weight_bias, *options, group, max_tokens, pdl, mnnvl, two_shot)

    return norm


def _untested(kernel: Kernel, *, mnnvl: bool) -> str | None:
    why = [UNTESTED_FP4] * (kernel.quantization == "nvfp4") + [UNTESTED_MNNVL] * mnnvl
    return "; ".join(why) or None


def _in_x_dtype(kernel: Kernel) -> tuple[str, ...]:
    """The tensors that a kernel reads and writes in x's dtype."""
    return (*("residual",) * kernel.adds, *("weight", "normed") * kernel.norms, kernel.outputs[-1])


def _requirements(kernel: Kernel, *, mnnvl: bool, two_shot: bool) -> tuple[Requirement, ...]:
    found: list[Requirement] = [
        KernelPresent.here(kernel.symbol, kernel.code),
        WorldSize(*WORLD_SIZES),
        DType("x", *HALVES, *(() if kernel.quantization else (torch.float32,))),
        # the kernels read every tensor in x's dtype; another one would be garbage without an error (vLLM#48324)
        SameDType("x", *_in_x_dtype(kernel)),
        # loads of 16 bytes; 8 elements, so that one rule does for all dtypes. NVFP4 has blocks of 16
        MultipleOf("x", dim=-1, of=16 if kernel.quantization == "nvfp4" else 8),
        OneCluster("x"),
    ]
    if kernel.adds:
        found.append(DTypeAttribute("residual_dtype", "x"))
    if kernel.quantization:
        # a norm that only the quantisation reads may be one rounding finer in the model than in the kernel
        found.append(DTypeAttribute("norm_dtype", "x", (torch.float32,)))
    elif kernel.norms:
        found.append(DTypeAttribute("norm_dtype", "x"))
    if kernel.quantization.endswith("fp8"):
        found += [Attribute("fp8_dtype", torch.float8_e4m3fn), Attribute("fp8_max", None, 448.0)]
    if kernel.quantization == "static_fp8":
        found.append(DType("scale", torch.float32))
    elif kernel.quantization == "token_fp8":
        found.append(Attribute("min_scale", None, LEAST_SCALE))
    elif kernel.quantization == "group_fp8":
        found += [
            Attribute("group_size", 128),
            Attribute("min_scale", None, 1e-10),
            Attribute("scale_format", "ue8m0_packed"),
            Attribute("scale_layout", "row_major"),
            MultipleOf("x", dim=-1, of=128),
        ]
    elif kernel.quantization == "nvfp4":
        # below capability 10 the kernel's body is compiled out: zeros, and no error
        found += [Capability(10), DType("global_scale", torch.float32)]
    if not kernel.in_parts:
        found.append(OneLaunch("x"))
    if two_shot:
        found += [VectorForEachRank("x"), MoreRowsThanRanks("x")]
        if kernel.quantization == "group_fp8" and kernel.norm_out:
            found.append(OneCluster("x", FEWER_THREADS))
    if mnnvl:
        found.append(MulticastAllowed.here())
    return tuple(found)


FORMS = (("", 0, None), ("two_shot", -2, None), ("pdl", 4, "pdl"), ("two_shot_pdl", 2, "pdl"), ("mnnvl", 6, "mnnvl"))
"""Suffix, rank and option of each form. What the user switched on comes first, and without the norm's output before
with it; which of one-shot and two-shot runs at a size is for measurements to say."""


def _strategies() -> tuple[Strategy, ...]:
    found = []
    for kernel in KERNELS:
        for suffix, rank, option in FORMS:
            mnnvl, two_shot = option == "mnnvl", suffix.startswith("two_shot")
            if mnnvl and kernel.quantization == "group_fp8":
                continue  # mnnvl has no such kernel
            sizes = TWO_SHOT if two_shot else ONE_SHOT
            found.append(
                Strategy(
                    pattern=kernel.pattern,
                    name=f"flashinfer.{kernel.name}" + (f"_{suffix}" if suffix else ""),
                    impl=_implementation(kernel, pdl=option == "pdl", mnnvl=mnnvl, two_shot=two_shot),
                    requires=_requirements(kernel, mnnvl=mnnvl, two_shot=two_shot),
                    worthwhile=(KnownFaster("x", sizes, "where it was measured to be faster"),),
                    outputs=kernel.outputs,
                    rank=rank - kernel.norm_out,
                    option=option,
                    # with a norm the kernels share a row between more or fewer blocks as there are fewer or more rows,
                    # and add its squares up in another order
                    batch_invariant=not kernel.norms and suffix == "",
                    untested=_untested(kernel, mnnvl=mnnvl),
                )
            )
    return tuple(found)


STRATEGIES = _strategies()
