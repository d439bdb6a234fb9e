"""The patterns that end in a LayerNorm."""

from __future__ import annotations

import torch

from fusion_core.patterns.definition import pattern
from fusion_core.vocabulary import add, all_reduce
from fusion_core.vocabulary import layer_norm as normalise


@pattern(outputs=("normed", "reduced"))
def all_reduce_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reduced = sum_r x_r``; ``normed`` is the LayerNorm of ``reduced``.

    The form without residual: a model's first norm, after a vocabulary-parallel embedding.

    Args:
        x: ``[..., n]``, floating.
        weight: ``[n]``, or None.
        bias: Of the norm, ``[n]``, or None.
        eps: Added to the variance.
        weight_bias: 0 for the usual form, 1 for Nemotron's.
        norm_dtype: Dtype of ``normed``; None for ``x.dtype``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    return normalise(reduced, weight, bias, eps, weight_bias=weight_bias, dtype=norm_dtype), reduced


@pattern(outputs=("normed", "residual_out", "reduced"), returns=("normed", "residual_out"))
def all_reduce_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``residual_out = sum_r x_r + residual``; ``normed`` is the LayerNorm of ``residual_out``.

    The norm is that of the rounded ``residual_out``, as in a model in plain torch.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        weight: ``[n]``, or None.
        bias: Of the norm, ``[n]``, or None.
        eps: Added to the variance.
        weight_bias: 0 for the usual form, 1 for Nemotron's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of ``x`` and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of ``residual_out``.
        group: The process group.
    """
    reduced = all_reduce(x, group)
    residual_out = add(reduced, residual, dtype=residual_dtype)
    normed = normalise(residual_out, weight, bias, eps, weight_bias=weight_bias, dtype=norm_dtype)
    return normed, residual_out, reduced
