"""Readings of the operators by which torchao quantises activations: its own, and those of MSLK that it calls.

Schemas and meanings as of torchao 0.18 (``quantization/quant_primitives.py``, ``prototype/mx_formats/kernels.py``) and
MSLK 1.2 (``mslk/quantize/triton/fp8_quantize.py``, ``quantize_kernels/nvfp4.py``). All of them are functional.

Most of torchao needs no reading. Its code in plain torch, and its operators that torch always decomposes
(``torchao::choose_scale_float8``), are plain torch in the graph. Its Triton operators
(``torchao::triton_fp8_blockwise_act_quant_lhs``) are kernels in the graph, which cannot be read.
"""

from __future__ import annotations

import torch

from fusion_core.lift.dialect import Dialect, Reading, Refusal
from fusion_core.lift.dialects.quantization import fp8_dtype, one_global_scale, one_scale
from fusion_core.lift.operands import Check, Derived, Only
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta

SMALLEST_MAXIMUM = 1e-12
"""MSLK's least maximum of a row if the caller chooses none (``get_fp8_constants``)."""


def least_row_scale(eps: float | None, output: TensorMeta) -> float | None:
    """The least scale if a row's maximum is at least ``eps``; None for the word's own, which is MSLK's default."""
    if eps == 1 / 512 or not output.dtype.is_floating_point:
        return None
    return (SMALLEST_MAXIMUM if eps is None else eps) / torch.finfo(output.dtype).max


def is_matrix(x: TensorMeta) -> Reason | None:
    """The reason if scales have another shape than the word's: MSLK's have the leading dimensions of ``x``."""
    return None if len(x.shape) == 2 else Reason("x", f"the operator quantises {x}", "two dimensions", "x")


STATIC: dict[str, Reading] = {
    # The schema's default of float8_dtype is a number, and the graph omits an argument equal to the default. So the
    # dtype is read from the result.
    "torchao::quantize_affine_float8_non_decomposed": Reading(
        "quantize_static_fp8",
        {"x": "tensor", "scale": "scale", "dtype": Derived(fp8_dtype, 0)},
        {"fp8_max": None},
        ("quantized",),
        needs=(Check(one_scale, "scale"),),
        ignored=("float8_dtype",),
    ),
}

ROWS: dict[str, Reading | Refusal] = {
    # The Triton kernel for every GPU; the scales have no trailing dimension. Rows that end early (zero_start_index_M)
    # and padded ones (align_rows_to) are not read.
    "triton::quantize_fp8_row": Reading(
        "quantize_token_fp8",
        {"x": "a", "dtype": Derived(fp8_dtype, 0), "min_scale": Derived(least_row_scale, "eps_opt", 0)},
        {"fp8_max": None},
        ("quantized", "scale"),
        needs=(Only("scale_ub", None),),
    ),
    "triton::quantize_fp8_tensor": Refusal(
        ("quantize_static_fp8", "quantize_token_fp8"),
        "a",
        Reason(
            "per_tensor",
            "triton::quantize_fp8_tensor takes one scale for the whole tensor, found at run time",
            "a scale that is known beforehand, or one for each token or group",
        ),
    ),
}

NVFP4: dict[str, Reading | Refusal] = {
    # The global scale is a multiplier: torchao passes the reciprocal of its per_tensor_scale. Block scales are at least
    # 2**-9, E4M3's least number above 0: a block below two millionths of the tensor's largest value may keep codes
    # that are 0 by the word's definition.
    "ao::mslk_quantize_nvfp4": Reading(
        "quantize_nvfp4",
        {"x": "x", "global_scale": "global_scale"},
        {"scale_layout": "swizzled_128x4"},
        {"quantized": 1, "scale": 0},
        needs=(Check(is_matrix, "x"), Check(one_global_scale, "global_scale")),
    ),
    "ao::mslk_quantize_nvfp4_stacked": Refusal(
        ("quantize_nvfp4",),
        "x",
        Reason(
            "global_scale",
            "ao::mslk_quantize_nvfp4_stacked takes a global scale for each expert",
            "one for all",
            "global_scale",
        ),
    ),
}


def _mxfp8(operator: str, x: str) -> Refusal:
    found = f"{operator} stores the exponent of a scale in a byte"
    return Refusal(
        ("quantize_group_fp8",), x, Reason("scale_format", found, "float32 scales, or four exponents to an int32")
    )


MXFP8 = {
    operator: _mxfp8(operator, x)
    for operator, x in (
        ("torchao::mxfp8_quantize", "input"),
        ("torchao::mxfp8_quantize_2d_1x32_cutedsl", "x"),
        ("torchao::mxfp8_quantize_2d_1x32_flydsl", "x"),
    )
}

DIALECT = Dialect("torchao", {**STATIC, **ROWS, **NVFP4, **MXFP8})
