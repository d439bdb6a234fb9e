"""The patterns that end in an all_reduce, in a bias or in an RMSNorm."""

from __future__ import annotations

import torch

from fusion_core.patterns.definition import pattern
from fusion_core.vocabulary import add, add_bias, rms_norm
from fusion_core.vocabulary import all_reduce as reduce_sum


@pattern(outputs=("reduced",))
def all_reduce(x: torch.Tensor, *, group: str) -> torch.Tensor:
    """Only the sum over all ranks: ``reduced = sum_r x_r``.

    Args:
        x: ``[..., n]``, floating.
        group: The process group.
    """
    reduced: torch.Tensor = reduce_sum(x, group)
    return reduced


@pattern(outputs=("sum", "reduced"), returns=("sum",))
def all_reduce_bias(
    x: torch.Tensor, bias: torch.Tensor, *, sum_dtype: torch.dtype | None = None, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """``reduced = sum_r x_r``; ``sum = reduced + bias``.

    A row-parallel linear layer with a bias, whose result goes into no norm that is fused with it.

    Args:
        x: ``[..., n]``, floating.
        bias: ``[n]``, equal on all ranks.
        sum_dtype: Dtype of ``sum``; None for torch's promotion of ``x`` and ``bias``.
        group: The process group.
    """
    reduced = reduce_sum(x, group)
    return add_bias(reduced, bias, dtype=sum_dtype), reduced


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

    The norm is that of the rounded ``residual_out``, as in a model in plain torch.

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


@pattern(
    outputs=("normed", "residual_out", "post_normed", "reduced"),
    returns=("normed", "residual_out"),
)
def all_reduce_rms_norm_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor | None,
    post_eps: float,
    weight: torch.Tensor | None,
    eps: float,
    *,
    post_weight_bias: float = 0.0,
    post_norm_dtype: torch.dtype | None = None,
    weight_bias: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``residual_out = rms_norm(sum_r x_r) + residual``; ``normed`` is the RMSNorm of ``residual_out``.

    The form of models that norm a layer's result before they add it, and the sum again for the next layer: Gemma 2 and
    3, GLM-4, and the end of OLMo 2 and 3.

    Args:
        x: ``[..., n]``, floating.
        residual: The shape of ``x``, equal on all ranks.
        post_weight: The weight of the norm of the sum over ranks, ``[n]``, or None.
        post_eps: Added to the mean of squares of the sum over ranks.
        weight: The weight of the norm of ``residual_out``, ``[n]``, or None.
        eps: Added to the mean of squares of ``residual_out``.
        post_weight_bias: 0 for Llama's form, 1 for Gemma's.
        post_norm_dtype: Dtype of the norm of the sum over ranks; None for ``x.dtype``.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        residual_dtype: Dtype of ``residual_out``; None for torch's promotion of the norm and ``residual``.
        norm_dtype: Dtype of ``normed``; None for that of ``residual_out``.
        group: The process group.
    """
    reduced = reduce_sum(x, group)
    post_normed = rms_norm(reduced, post_weight, post_eps, weight_bias=post_weight_bias, dtype=post_norm_dtype)
    residual_out = add(post_normed, residual, dtype=residual_dtype)
    normed = rms_norm(residual_out, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    return normed, residual_out, post_normed, reduced
