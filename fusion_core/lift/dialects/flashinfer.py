"""Readings of FlashInfer's operators, and of vLLM's operators that wrap them.

Schemas and meanings as of FlashInfer 0.7.2 (``flashinfer/quantization/fp4_quantization.py``, and what that calls:
``cvt_warp_fp16_to_fp4`` in ``quantization_utils.cuh``) and of vLLM's ``vllm/utils/flashinfer.py``. All of them are
functional.

``flashinfer::fp4_quantize`` is the only quantiser that FlashInfer registers with torch. Its sources mark
``flashinfer::rmsnorm``, ``flashinfer::fp4_quantize_sm100`` and others with a decorator that does nothing, so no graph
contains them.
"""

from __future__ import annotations

import os

from fusion_core.lift.algebra import same_size
from fusion_core.lift.dialect import Dialect, Reading, Refusal
from fusion_core.lift.dialects.quantization import one_global_scale
from fusion_core.lift.operands import Check, Derived, Only
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta

FOUR_OVER_SIX = "FLASHINFER_NVFP4_4OVER6"
"""The environment variable that makes FlashInfer choose each block's scale by its error, unless the caller decides."""


def four_over_six() -> bool:
    """Whether the environment variable is set."""
    return os.environ.get(FOUR_OVER_SIX) == "1"


def amax_over_six(code: int) -> Reason | None:
    """The reason if a block's scale is not its maximum over 6, else None. Code 0 is that rule, -1 the environment's."""
    if code == 0 or (code == -1 and not four_over_six()):
        return None
    found = f"{FOUR_OVER_SIX} is 1" if code == -1 else f"nvfp4_4over6_code is {code}"
    return Reason("nvfp4_4over6", f"{found}: block scales are chosen by their error", "each block's maximum over 6")


def nvfp4_scale_layout(is_swizzled: bool, is_8x4: bool) -> str | Reason:
    """The layout of block scales, or a reason: the vocabulary has no tiles of 8 by 4."""
    if is_swizzled and is_8x4:
        return Reason("scale_layout", "block scales are swizzled in tiles of 8x4", "swizzled_128x4 or linear")
    return "swizzled_128x4" if is_swizzled else "linear"


def is_row_major(x: TensorMeta) -> Reason | None:
    """The reason if an input would be quantised along another dimension: FlashInfer transposes a column-major one."""
    if x.stride is None or len(x.stride) < 2 or not same_size(x.stride[-2], 1):
        return None
    return Reason("strides", f"the operator quantises {x} with strides {x.stride}", "row-major strides", "x")


# One operator for NVFP4 and MXFP4, by its arguments: each reading applies where the other is refused. Block scales are
# always uint8.
FP4 = {
    "flashinfer::fp4_quantize": (
        Reading(
            "quantize_nvfp4",
            {
                "x": "input",
                "global_scale": "global_scale",  # a multiplier
                "scale_layout": Derived(nvfp4_scale_layout, "is_sf_swizzled_layout", "is_sf_8x4_layout"),
            },
            results=("quantized", "scale"),
            needs=(
                Only("sf_use_ue8m0", False),
                Only("sf_vec_size", 16),
                Check(one_global_scale, "global_scale"),
                Check(amax_over_six, "nvfp4_4over6_code"),
                Check(is_row_major, "input"),
            ),
            ignored=("enable_pdl",),
        ),
        Reading(
            "quantize_mxfp4",
            {"x": "input"},
            {"scale_rounding": "up", "ties": "even"},
            ("quantized", "scale"),
            needs=(
                Only("sf_use_ue8m0", True),
                Only("sf_vec_size", 32),
                Only("is_sf_swizzled_layout", False),
                Check(is_row_major, "input"),
            ),
            ignored=("enable_pdl", "global_scale"),  # which MXFP4 does not apply to 16-bit input
        ),
    ),
}

WRAPPED_BY_VLLM = {
    "vllm::flashinfer_nvfp4_quantize": Refusal(
        ("quantize_nvfp4",),
        "a",
        Reason(
            "scale_layout",
            "vllm::flashinfer_nvfp4_quantize swizzles block scales in tiles of 8x4",
            "swizzled_128x4 or linear",
        ),
    ),
    "vllm::flashinfer_mxfp4_quantize": Refusal(
        ("quantize_mxfp4",),
        "a",
        Reason("scale_layout", "vllm::flashinfer_mxfp4_quantize swizzles block scales in tiles of 128x4", "linear"),
    ),
}

DIALECT = Dialect("flashinfer", {**FP4, **WRAPPED_BY_VLLM}, state=four_over_six)
