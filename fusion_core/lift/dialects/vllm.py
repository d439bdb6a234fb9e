"""Readings of vLLM's operators: its all_reduce, norms, quantisers and fused norms.

Schemas and meanings as of vLLM 0.33: ``vllm/ir/ops/layernorm.py``, ``csrc/libtorch_stable`` (``layernorm_*``,
``quantization/``), ``vllm/_aiter_ops.py``, ``vllm/model_executor/layers/quantization/utils/fp8_utils.py``. They write
into buffers of the caller, named in ``results``, unless marked functional.
"""

from __future__ import annotations

import torch

from fusion_core.lift.dialect import Dialect, Reading, Refusal
from fusion_core.lift.dialects.quantization import fp8_dtype, group_scale_layout, one_scale, swizzled_or_linear
from fusion_core.lift.dialects.vllm_groups import shared_groups, shared_memory_group, torch_group
from fusion_core.lift.operands import Check, Derived, Earlier, Only
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta

EPS = 1e-10
"""The least maximum in vLLM's Triton and AITER's group quantisers; callers cannot choose it."""


# ---- operands derived from arguments


def weight_is_a_vector(weight: TensorMeta | None) -> Reason | None:
    """The reason if a norm's weight is not one factor per column, else None."""
    if weight is None or len(weight.shape) == 1:
        return None
    return Reason("weight", f"the norm's weight is {weight}", "one dimension", "weight")


def sum_dtype(x: TensorMeta, residual: TensorMeta) -> torch.dtype | None:
    """The dtype of a fused add: that of ``x``, or None if torch's promotion gives the same."""
    return None if torch.promote_types(x.dtype, residual.dtype) == x.dtype else x.dtype


def fp8_max(output: TensorMeta) -> float | None:
    """The largest magnitude of vLLM's own kernels: 224 for e4m3fnuz (``quant_type_max``), else the dtype's."""
    return 224.0 if output.dtype == torch.float8_e4m3fnuz else None


def given_fp8_max(output: TensorMeta, low: float, high: float) -> float | Reason | None:
    """The largest magnitude that the caller chose; None for the dtype's own."""
    if low != -high:
        return Reason("fp8_min", f"the codes lie between {low} and {high}", "symmetric bounds", "fp8_min")
    return None if output.dtype.is_floating_point and high == torch.finfo(output.dtype).max else high


def least_group_scale(eps: float, high: float, is_ue8m0: bool) -> float | None:
    """The least scale if a maximum is at least ``eps``; None for the word's own."""
    # csrc/…/per_token_group_quant.cu: absmax starts at eps; a UE8M0 scale is at least 1e-10 before it is rounded up
    least = max(eps / high, 1e-10) if is_ue8m0 else eps / high
    return None if is_ue8m0 and least == 1e-10 else least


def least_packed_scale(eps: float, high: float) -> float | None:
    """`least_group_scale` for packed UE8M0 scales."""
    return least_group_scale(eps, high, True)


def least_triton_scale(output: TensorMeta) -> float | None:
    """The least scale of vLLM's Triton group quantiser."""
    return EPS / (fp8_max(output) or torch.finfo(output.dtype).max) if output.dtype.is_floating_point else None


def least_aiter_scale(output: TensorMeta) -> float | None:
    """The least scale of AITER's group quantiser."""
    return EPS / torch.finfo(output.dtype).max if output.dtype.is_floating_point else None


def ue8m0_or_float32(is_ue8m0: bool) -> str:
    """The format of group scales."""
    return "ue8m0" if is_ue8m0 else "float32"


def transposed_scale_layout(scale: TensorMeta, is_transposed: bool) -> str | Reason:
    """The layout of group scales for an operator that writes them by a flag and ignores their strides."""
    layout = group_scale_layout(scale)
    written = "column_major" if is_transposed else "row_major"
    if isinstance(layout, Reason) or layout == written or 1 in scale.shape:  # one row has the same memory as one column
        return layout
    found = f"the scales are {layout} by their strides, and written {written}"
    return Reason("scale_layout", found, "strides that match is_scale_transposed", "scale")


# ---- words common to several operators


def norm(x: str | Earlier, normed: int | str | None, *, of_unrounded_sum: bool = False) -> Reading:
    """An RMSNorm that rounds ``x * rsqrt(...)`` to the weight's dtype before it multiplies by the weight."""
    unrounded = {"norm_of_unrounded_sum": True} if of_unrounded_sum else {}
    return Reading(
        "rms_norm",
        {"x": x, "weight": "weight", "eps": "epsilon"},
        {"weight_bias": 0.0, "dtype": None},
        {"normed": normed},
        needs=(Check(weight_is_a_vector, "weight"),),
        notes={"weight_after_cast": True, **unrounded},
    )


def add(x: str, residual: str, total: int | str, when: str | None = None) -> Reading:
    """A residual add."""
    dtype = Derived(sum_dtype, x, residual)
    return Reading("add", {"x": x, "residual": residual, "dtype": dtype}, results={"sum": total}, when=when)


def static_fp8(x: str | Earlier, *needs: Only | Check) -> Reading:
    """FP8 with one scale from the caller."""
    return Reading(
        "quantize_static_fp8",
        {"x": x, "scale": "scale", "dtype": Derived(fp8_dtype, "result"), "fp8_max": Derived(fp8_max, "result")},
        results={"quantized": "result"},
        needs=(Check(one_scale, "scale"), *needs),
    )


def token_fp8(x: str | Earlier) -> Reading:
    """FP8 with one scale per token, without an upper bound."""
    return Reading(
        "quantize_token_fp8",
        {"x": x, "dtype": Derived(fp8_dtype, "result"), "fp8_max": Derived(fp8_max, "result")},
        {"min_scale": None},
        {"quantized": "result", "scale": "scale"},
        needs=(Only("scale_ub", None),),
    )


def nvfp4(quantized: int | str, scale: int | str) -> Reading:
    """NVFP4; the scale is a multiplier. Swizzled block scales are stored four to an int32, linear ones as uint8."""
    return Reading(
        "quantize_nvfp4",
        {
            "x": "input",
            "global_scale": "input_scale",
            "scale_layout": Derived(swizzled_or_linear, "is_sf_swizzled_layout"),
        },
        results={"quantized": quantized, "scale": scale},
        needs=(Check(one_scale, "input_scale"),),
    )


NORMED = Earlier("normed")
SUM = Earlier("sum")
SUM_OR_INPUT = Earlier("sum", otherwise="input")


# ---- the operators

Read = Reading | tuple[Reading, ...] | Refusal

COLLECTIVES: dict[str, Read] = {
    "vllm::all_reduce": Reading(
        "all_reduce",
        {"x": "tensor", "group": Derived(torch_group, "group_name")},
        results={"reduced": 0},
        notes={"collective": "vllm::all_reduce"},
    ),
    "_C::shm_allreduce": Reading(  # of a CPU build, in place
        "all_reduce",
        {"x": "data", "group": Derived(shared_memory_group, "handle")},
        results={"reduced": "data"},
        notes={"collective": "_C::shm_allreduce"},
    ),
}

NORMS: dict[str, Read] = {
    "vllm_ir::rms_norm": norm("x", 0),  # functional; variance_size must be None
    "vllm_ir::fused_add_rms_norm": (add("x", "x_residual", 1), norm(SUM, 0, of_unrounded_sum=True)),  # functional
    "_C::rms_norm": norm("input", "result"),
    "_C::fused_add_rms_norm": (add("input", "residual", "residual"), norm(SUM, "input")),
}

QUANTISERS: dict[str, Read] = {
    # (-1, -1) is the group shape of one scale for the whole tensor
    "_C::static_scaled_fp8_quant": static_fp8("input", Only("group_shape", None, (-1, -1))),
    "_C::dynamic_per_token_scaled_fp8_quant": token_fp8("input"),
    "_C::dynamic_scaled_fp8_quant": Refusal(
        ("quantize_static_fp8", "quantize_token_fp8"),
        "input",
        Reason(
            "per_tensor",
            "_C::dynamic_scaled_fp8_quant takes one scale for the whole tensor, found at run time",
            "a scale that is known beforehand, or one for each token or group",
        ),
    ),
    "_C::per_token_group_fp8_quant": Reading(
        "quantize_group_fp8",
        {
            "x": "input",
            "group_size": "group_size",
            "dtype": Derived(fp8_dtype, "output_q"),
            "fp8_max": Derived(given_fp8_max, "output_q", "fp8_min", "fp8_max"),
            "min_scale": Derived(least_group_scale, "eps", "fp8_max", "scale_ue8m0"),
            "scale_format": Derived(ue8m0_or_float32, "scale_ue8m0"),
            "scale_layout": Derived(group_scale_layout, "output_s"),  # the kernel goes by the strides
        },
        results={"quantized": "output_q", "scale": "output_s"},
        ignored=("dummy_is_scale_transposed", "dummy_is_tma_aligned"),
    ),
    "_C::per_token_group_fp8_quant_packed": Reading(
        "quantize_group_fp8",
        {
            "x": "input",
            "group_size": "group_size",
            "dtype": Derived(fp8_dtype, "output_q"),
            "fp8_max": Derived(given_fp8_max, "output_q", "fp8_min", "fp8_max"),
            "min_scale": Derived(least_packed_scale, "eps", "fp8_max"),
        },
        {"scale_format": "ue8m0_packed", "scale_layout": "row_major"},
        {"quantized": "output_q", "scale": "output_s_packed"},
    ),
    "vllm::triton_per_token_group_quant_fp8": Reading(  # functional
        "quantize_group_fp8",
        {
            "x": "x",
            "group_size": "group_size",
            "dtype": Derived(fp8_dtype, 0),
            "fp8_max": Derived(fp8_max, 0),
            "min_scale": Derived(least_triton_scale, 0),
        },
        {"scale_format": "float32", "scale_layout": "row_major"},
        {"quantized": 0, "scale": 1},
    ),
    "vllm::rocm_aiter_group_fp8_quant": Reading(  # functional
        "quantize_group_fp8",
        {
            "x": "x",
            "group_size": "group_size",
            "dtype": Derived(fp8_dtype, 0),
            "min_scale": Derived(least_aiter_scale, 0),
        },
        {"fp8_max": None, "scale_format": "float32", "scale_layout": "row_major"},
        {"quantized": 0, "scale": 1},
        # AITER's quantiser always uses groups of 128. Transposed scales, which the reading does not account for, are
        # written in another order than their strides.
        needs=(Only("group_size", 128),),
    ),
    "vllm::rocm_aiter_per_token_quant": Reading(  # functional; scale must be None
        "quantize_token_fp8",
        {"x": "x", "dtype": Derived(fp8_dtype, "quant_dtype")},
        {"fp8_max": None, "min_scale": 0.0},
        {"quantized": 0, "scale": 1},
    ),
    "_C::scaled_fp4_quant": nvfp4(0, 1),  # functional
    "_C::scaled_fp4_quant.out": nvfp4("output", "output_scale"),
}

FUSED: dict[str, Read] = {
    "_C::rms_norm_static_fp8_quant": (norm("input", None), static_fp8(NORMED)),
    "_C::fused_add_rms_norm_static_fp8_quant": (
        add("input", "residual", "residual"),
        norm(SUM, None),
        static_fp8(NORMED),
    ),
    "_C::rms_norm_dynamic_per_token_quant": (
        add("input", "residual", "residual", when="residual"),
        norm(SUM_OR_INPUT, None, of_unrounded_sum=True),
        token_fp8(NORMED),
    ),
    "_C::rms_norm_per_block_quant": (
        add("input", "residual", "residual", when="residual"),
        norm(SUM_OR_INPUT, None, of_unrounded_sum=True),
        Reading(
            "quantize_group_fp8",
            {
                "x": NORMED,
                "group_size": "group_size",
                "dtype": Derived(fp8_dtype, "result"),
                "fp8_max": Derived(fp8_max, "result"),
                "scale_layout": Derived(transposed_scale_layout, "scale", "is_scale_transposed"),
            },
            {"min_scale": None, "scale_format": "float32"},
            {"quantized": "result", "scale": "scale"},
            needs=(Only("scale_ub", None),),
        ),
    ),
}

# vllm::rocm_unquantized_gemm, to which an indexer passes the norm, needs no reading: it is a user like any other
DIALECT = Dialect("vllm", {**COLLECTIVES, **NORMS, **QUANTISERS, **FUSED}, state=shared_groups)
