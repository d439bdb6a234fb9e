"""The patterns that end in FP4.

All share the parameters of `all_reduce_rms_norm` and `all_reduce_add_rms_norm`, and quantise the *rounded* norm, as the
vendors' kernels do. `fusion_core.vocabulary` defines each quantisation exactly.
"""

from __future__ import annotations

import torch

from fusion_core.patterns.definition import pattern
from fusion_core.vocabulary import add, all_reduce, quantize_mxfp4, quantize_nvfp4, rms_norm
from fusion_core.vocabulary.fp4 import Mxfp4ScaleRounding, Nvfp4ScaleLayout, Ties


@pattern(
    outputs=("quantized", "scale", "normed", "reduced"),
    returns=("quantized", "scale", "reduced"),
)
def all_reduce_rms_norm_nvfp4(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    global_scale: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    scale_layout: Nvfp4ScaleLayout = "swizzled_128x4",
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_rms_norm`, its ``normed`` quantised: E2M1 codes, an E4M3 scale per 16.

    Args:
        x: ``[..., n]``, floating.
        weight: ``[n]``, or None.
        global_scale: A *multiplier*, one float32.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        scale_layout: ``"swizzled_128x4"`` or ``"linear"``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    normed = rms_norm(reduced, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_nvfp4(normed, global_scale, scale_layout=scale_layout)
    return quantized, scale, normed, reduced


@pattern(
    outputs=("quantized", "scale", "normed", "residual_out", "reduced"),
    returns=("quantized", "scale", "residual_out"),
)
def all_reduce_add_rms_norm_nvfp4(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    global_scale: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    scale_layout: Nvfp4ScaleLayout = "swizzled_128x4",
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_add_rms_norm`, its ``normed`` quantised: E2M1 codes, an E4M3 scale per 16.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        weight: ``[n]``, or None.
        global_scale: A *multiplier*, one float32.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of ``x`` and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        scale_layout: ``"swizzled_128x4"`` or ``"linear"``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    residual_out = add(reduced, residual, dtype=residual_dtype)
    normed = rms_norm(residual_out, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_nvfp4(normed, global_scale, scale_layout=scale_layout)
    return quantized, scale, normed, residual_out, reduced


@pattern(
    outputs=("quantized", "scale", "normed", "reduced"),
    returns=("quantized", "scale", "reduced"),
)
def all_reduce_rms_norm_mxfp4(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    scale_rounding: Mxfp4ScaleRounding = "even",
    ties: Ties = "even",
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_rms_norm`, its ``normed`` quantised: E2M1 codes, a power of two per 32.

    Args:
        x: ``[..., n]``, floating.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        scale_rounding: ``"even"``, ``"floor"`` or ``"up"``.
        ties: ``"even"`` or ``"away"``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    normed = rms_norm(reduced, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_mxfp4(normed, scale_rounding=scale_rounding, ties=ties)
    return quantized, scale, normed, reduced


@pattern(
    outputs=("quantized", "scale", "normed", "residual_out", "reduced"),
    returns=("quantized", "scale", "residual_out"),
)
def all_reduce_add_rms_norm_mxfp4(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    scale_rounding: Mxfp4ScaleRounding = "even",
    ties: Ties = "even",
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_add_rms_norm`, its ``normed`` quantised: E2M1 codes, a power of two per 32.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of ``x`` and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        scale_rounding: ``"even"``, ``"floor"`` or ``"up"``.
        ties: ``"even"`` or ``"away"``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    residual_out = add(reduced, residual, dtype=residual_dtype)
    normed = rms_norm(residual_out, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_mxfp4(normed, scale_rounding=scale_rounding, ties=ties)
    return quantized, scale, normed, residual_out, reduced
