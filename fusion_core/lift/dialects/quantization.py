"""Derived operands and checks for readings of quantising operators."""

from __future__ import annotations

import torch

from fusion_core.lift.algebra import same_shape
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta, dtype_name
from fusion_core.vocabulary.fp8 import FLOAT8


def fp8_dtype(output: TensorMeta | torch.dtype) -> torch.dtype | Reason:
    """The FP8 dtype of an output, or a reason: the same operators also quantise to int8."""
    dtype = output.dtype if isinstance(output, TensorMeta) else output
    if dtype in FLOAT8:
        return dtype
    return Reason("dtype", f"the operator quantises to {dtype_name(dtype)}", " or ".join(map(dtype_name, FLOAT8)))


def one_scale(scale: TensorMeta) -> Reason | None:
    """The reason if a scale is not one float32 for the whole tensor, else None."""
    if scale.dtype == torch.float32 and all(isinstance(size, int) and size == 1 for size in scale.shape):
        return None
    return Reason("scale", f"the scale is {scale}", "one float32", "scale")


def one_global_scale(scale: TensorMeta | None) -> Reason | None:
    """The reason if a global scale is not one float32, else None; FlashInfer also accepts one per token."""
    if scale is None:
        return Reason("global_scale", "the operator has no global scale", "one float32", "global_scale")
    return one_scale(scale)


def swizzled_or_linear(is_swizzled: bool) -> str:
    """The layout of NVFP4 block scales."""
    return "swizzled_128x4" if is_swizzled else "linear"


def group_scale_layout(scale: TensorMeta) -> str | Reason:
    """The layout of float32 group scales ``(tokens, groups)``, from their strides."""
    if len(scale.shape) == 2 and scale.stride is not None:
        tokens, groups = scale.shape
        if same_shape(scale.stride, (groups, 1)):
            return "row_major"
        if same_shape(scale.stride, (1, tokens)):
            return "column_major"
    found = f"the scales are {scale} with strides {scale.stride}"
    return Reason("scale_layout", found, "(tokens, groups) in strides (groups, 1) or (1, tokens)", "scale")
