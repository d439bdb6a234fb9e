"""The patterns that end in FP8.

All share the parameters of `all_reduce_rms_norm` and `all_reduce_add_rms_norm`, and quantise the *rounded* norm, as the
vendors' kernels do. `fusion_core.vocabulary` defines each quantisation exactly.
"""

from __future__ import annotations

import torch

from fusion_core.patterns.definition import pattern
from fusion_core.vocabulary import (
    add,
    all_reduce,
    quantize_group_fp8,
    quantize_static_fp8,
    quantize_token_fp8,
    rms_norm,
)
from fusion_core.vocabulary.fp8 import ScaleFormat, ScaleLayout


@pattern(
    outputs=("quantized", "normed", "reduced"),
    returns=("quantized", "reduced"),
)
def all_reduce_rms_norm_static_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_rms_norm`, its ``normed`` quantised: one scale known beforehand.

    Args:
        x: ``[..., n]``, floating.
        weight: ``[n]``, or None.
        scale: The dequantisation scale, one float32.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``fp8_dtype``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    normed = rms_norm(reduced, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    return quantize_static_fp8(normed, scale, dtype=fp8_dtype, fp8_max=fp8_max), normed, reduced


@pattern(
    outputs=("quantized", "normed", "residual_out", "reduced"),
    returns=("quantized", "residual_out"),
)
def all_reduce_add_rms_norm_static_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float,
    *,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_add_rms_norm`, its ``normed`` quantised: one scale known beforehand.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        weight: ``[n]``, or None.
        scale: The dequantisation scale, one float32.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of ``x`` and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``fp8_dtype``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    residual_out = add(reduced, residual, dtype=residual_dtype)
    normed = rms_norm(residual_out, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    return quantize_static_fp8(normed, scale, dtype=fp8_dtype, fp8_max=fp8_max), normed, residual_out, reduced


@pattern(
    outputs=("quantized", "scale", "normed", "reduced"),
    returns=("quantized", "scale", "reduced"),
)
def all_reduce_rms_norm_token_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    min_scale: float | None = None,
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_rms_norm`, its ``normed`` quantised: one scale per token.

    Args:
        x: ``[..., n]``, floating.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``fp8_dtype``.
        min_scale: The least scale; None for the word's own.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    normed = rms_norm(reduced, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_token_fp8(normed, dtype=fp8_dtype, fp8_max=fp8_max, min_scale=min_scale)
    return quantized, scale, normed, reduced


@pattern(
    outputs=("quantized", "scale", "normed", "residual_out", "reduced"),
    returns=("quantized", "scale", "residual_out"),
)
def all_reduce_add_rms_norm_token_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    min_scale: float | None = None,
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_add_rms_norm`, its ``normed`` quantised: one scale per token.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of ``x`` and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``fp8_dtype``.
        min_scale: The least scale; None for the word's own.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    residual_out = add(reduced, residual, dtype=residual_dtype)
    normed = rms_norm(residual_out, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_token_fp8(normed, dtype=fp8_dtype, fp8_max=fp8_max, min_scale=min_scale)
    return quantized, scale, normed, residual_out, reduced


@pattern(
    outputs=("quantized", "scale", "normed", "reduced"),
    returns=("quantized", "scale", "reduced"),
)
def all_reduce_rms_norm_group_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    group_size: int = 128,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    min_scale: float | None = None,
    scale_format: ScaleFormat = "float32",
    scale_layout: ScaleLayout = "row_major",
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_rms_norm`, its ``normed`` quantised: one scale per ``group_size`` neighbours.

    Args:
        x: ``[..., n]``, floating.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        group_size: Elements per scale.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``fp8_dtype``.
        min_scale: The least scale; None for the word's own.
        scale_format: ``"float32"``, ``"ue8m0"`` or ``"ue8m0_packed"``.
        scale_layout: ``"row_major"`` or ``"column_major"``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    normed = rms_norm(reduced, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_group_fp8(
        normed,
        group_size=group_size,
        dtype=fp8_dtype,
        fp8_max=fp8_max,
        min_scale=min_scale,
        scale_format=scale_format,
        scale_layout=scale_layout,
    )
    return quantized, scale, normed, reduced


@pattern(
    outputs=("quantized", "scale", "normed", "residual_out", "reduced"),
    returns=("quantized", "scale", "residual_out"),
)
def all_reduce_add_rms_norm_group_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    group_size: int = 128,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    min_scale: float | None = None,
    scale_format: ScaleFormat = "float32",
    scale_layout: ScaleLayout = "row_major",
    group: str,
) -> tuple[torch.Tensor, ...]:
    """`all_reduce_add_rms_norm`, its ``normed`` quantised: one scale per ``group_size`` neighbours.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of ``x`` and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of the norm's input.
        group_size: Elements per scale.
        fp8_dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``fp8_dtype``.
        min_scale: The least scale; None for the word's own.
        scale_format: ``"float32"``, ``"ue8m0"`` or ``"ue8m0_packed"``.
        scale_layout: ``"row_major"`` or ``"column_major"``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    residual_out = add(reduced, residual, dtype=residual_dtype)
    normed = rms_norm(residual_out, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    quantized, scale = quantize_group_fp8(
        normed,
        group_size=group_size,
        dtype=fp8_dtype,
        fp8_max=fp8_max,
        min_scale=min_scale,
        scale_format=scale_format,
        scale_layout=scale_layout,
    )
    return quantized, scale, normed, residual_out, reduced
