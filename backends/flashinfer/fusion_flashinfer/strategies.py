"""FlashInfer's strategies: one per pattern, with the requirements that its kernels do not check themselves.

A strategy's variants are the kernels with and without the norm as an output, each in every form that it is launched in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusion_core import (
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
"""The least dynamic FP8 scale: ``trtllm_allreduce_fusion.cuh``, and the default of `quantize_token_fp8`."""

UNTESTED_FP4 = "no GPU of compute capability 10 was at hand"
UNTESTED_MNNVL = "NVLink multicast was off on the machines at hand"


def _forms() -> tuple[Variant, ...]:
    """The forms in which FlashInfer launches every kernel.

    What the user switched on comes first. Measurements decide between one-shot and two-shot at each size.
    """
    one_shot, two_shot = (
        (KnownFaster("x", sizes, "where it was measured to be faster"),) for sizes in (ONE_SHOT, TWO_SHOT)
    )
    more = (VectorForEachRank("x"), MoreRowsThanRanks("x"))
    multicast = (MulticastAllowed.here(),)
    return (
        Variant("", {}, (), one_shot),
        Variant("two_shot", {"two_shot": True}, more, two_shot, rank=-2),
        Variant("pdl", {"pdl": True}, (), one_shot, rank=4, option="pdl"),
        Variant("two_shot_pdl", {"pdl": True, "two_shot": True}, more, two_shot, rank=2, option="pdl"),
        Variant("mnnvl", {"mnnvl": True}, multicast, one_shot, rank=6, option="mnnvl", untested=UNTESTED_MNNVL),
    )


def _all_reduce(
    x: Tensor,
    *,
    group: str,
    max_tokens: int | None = None,
    numerics: str = "default",
    pdl: bool = False,
    mnnvl: bool = False,
    two_shot: bool = False,
) -> Any:
    """The operator; with deterministic numerics it never takes the unfused path for many rows."""
    return operator(KERNELS[0])(x, group, max_tokens, pdl, mnnvl, two_shot, numerics == "deterministic")


def _requirements(kernel: Kernel) -> tuple[Requirement, ...]:
    """The requirements of every variant."""
    # the kernels read every tensor as x's dtype; another dtype gives garbage without an error (vLLM#48324)
    in_x_dtype = (*("residual",) * kernel.adds, *("weight", "normed") * kernel.norms, kernel.outputs[-1])
    found: list[Requirement] = [
        WorldSize(*WORLD_SIZES),
        DType("x", *HALVES, *(() if kernel.quantization else (torch.float32,))),
        SameDType("x", *in_x_dtype),
        # loads of 16 bytes: 8 elements, so that one rule covers all dtypes. NVFP4 has blocks of 16
        MultipleOf("x", dim=-1, of=16 if kernel.quantization == "nvfp4" else 8),
        OneCluster("x"),
    ]
    if kernel.norms:
        found.append(Present("weight"))
    if kernel.adds:
        found.append(DTypeAttribute("residual_dtype", "x"))
    if kernel.quantization:
        # if only the quantisation reads the norm, the model may skip a rounding that the kernel does
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
    return tuple(found)


def _variants(kernel: Kernel, forms: tuple[Variant, ...]) -> Iterator[Variant]:
    """A kernel in each of its forms."""
    present = KernelPresent.here(kernel.symbol, kernel.code)
    for form in forms:
        requires = (present, *form.requires)
        if kernel.quantization == "group_fp8":
            if form.option == "mnnvl":
                continue  # mnnvl has no such kernel
            if kernel.norm_out and "two_shot" in form.arguments:
                requires += (OneCluster("x", FEWER_THREADS),)
        yield replace(
            form,
            name="_".join(filter(None, ("out" if kernel.norm_out else "", form.name))),
            requires=requires,
            outputs=kernel.outputs,
            impl=operator(kernel) if kernel.norms else None,
            rank=form.rank - kernel.norm_out,  # without the norm's output before with it
            # with a norm, the number of blocks that share a row depends on the number of rows, and so does the order in
            # which its squares are added
            batch_invariant=not kernel.norms and form.name == "",
        )


def _strategies() -> Iterator[Strategy]:
    forms = _forms()
    for pattern, group in itertools.groupby(KERNELS, lambda kernel: kernel.pattern):
        kernels = tuple(group)
        requires = _requirements(kernels[0])
        required = [each.name for each in requires if isinstance(each, Attribute | DTypeAttribute)]
        yield Strategy(
            pattern=pattern,
            name=f"flashinfer.{pattern}",
            impl=operator(kernels[0]) if kernels[0].norms else _all_reduce,
            requires=requires,
            untested=UNTESTED_FP4 if kernels[0].quantization == "nvfp4" else None,
            # of the scalars that must have certain values, the operators take only the group size
            settled=tuple(name for name in required if name != "group_size"),
            variants=tuple(variant for kernel in kernels for variant in _variants(kernel, forms)),
        )


STRATEGIES = tuple(_strategies())
