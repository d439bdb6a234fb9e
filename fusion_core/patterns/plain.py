"""The patterns that end in an all_reduce or in an RMSNorm."""

from __future__ import annotations

import torch

from fusion_core.patterns.definition import pattern
from fusion_core.vocabulary import add, rms_norm
from fusion_core.vocabulary import all_reduce as reduce_sum


@pattern(outputs=("reduced",))
def all_reduce(x: torch.Tensor, *, group: str) -> torch.Tensor:
    """The bare sum over all ranks: ``reduced = sum_r x_r``.

    Args:
        x: ``[..., n]``, floating.
        group: The process group.
    """
    reduced: torch.Tensor = reduce_sum(x, group)
    return reduced


@pattern(outputs=("normed", "reduced"))
def all_reduce_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reduced = sum_r x_r``; ``normed = reduced * rsqrt(mean(reduced^2) + eps) * (weight + weight_bias)``.

    The form without residual: a model's first norm, after a vocabulary-parallel embedding.

    Args:
        x: ``[..., n]``, floating.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of ``normed``; None for ``x.dtype``.
        group: The process group.
    """
    reduced = reduce_sum(x, group)
    return rms_norm(reduced, weight, eps, weight_bias=weight_bias, dtype=norm_dtype), reduced


@pattern(outputs=("normed", "residual_out", "reduced"), returns=("normed", "residual_out"))
def all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``residual_out = sum_r x_r + residual``; ``normed`` is the RMSNorm of ``residual_out``.

    The norm is taken of the rounded ``residual_out``, as a model in plain torch takes it.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        weight: ``[n]``, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of ``x`` and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of ``residual_out``.
        group: The process group.
    """
    reduced = reduce_sum(x, group)
    residual_out = add(reduced, residual, dtype=residual_dtype)
    return rms_norm(residual_out, weight, eps, weight_bias=weight_bias, dtype=norm_dtype), residual_out, reduced
