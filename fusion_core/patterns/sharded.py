"""The patterns of vectors that are split over the ranks, which models gather whole."""

from __future__ import annotations

from typing import Any

import torch

from fusion_core.patterns.definition import pattern
from fusion_core.site import TensorMeta
from fusion_core.vocabulary.sharded import all_gather_shard as own_part
from fusion_core.vocabulary.sharded import mean_square_over_ranks, mean_squares_over_ranks, scale_by_rms


@pattern(outputs=("shard",))
def all_gather_shard(x: torch.Tensor, *, group: str) -> torch.Tensor:
    """The rank's own part of what an all_gather makes whole: ``shard = x``.

    Hugging Face gathers the values of the attention this way, where queries and keys are normed over all heads.

    Args:
        x: ``[..., n]``, the rank's part, floating.
        group: The process group.
    """
    shard: torch.Tensor = own_part(x, group)
    return shard


@pattern(outputs=("normed",))
def sharded_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> torch.Tensor:
    """RMSNorm of vectors that are split over the ranks; of its result, the rank's own part.

    ``normed = x * rsqrt(mean_r(mean(x_r^2)) + eps) * (weight + weight_bias)``.

    Args:
        x: ``[..., n]``, the rank's part, floating.
        weight: ``[n]``, the rank's part of the weight, or None.
        eps: Added to the mean of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of ``normed``; None for ``x.dtype``.
        group: The process group.
    """
    square = mean_square_over_ranks(x, group)
    normed: torch.Tensor = scale_by_rms(x, square, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    return normed


def _pair(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Half as many keys as queries, where they can be halved."""
    keys = max(shape[-1] // 2, 1) if shape else 1
    return {"y": TensorMeta((*shape[:-1], keys), dtype), "y_weight": TensorMeta((keys,), dtype)}


@pattern(outputs=("normed", "y_normed"), example=_pair)
def sharded_rms_norm_pair(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    y_weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sharded_rms_norm` of two vectors a token, of queries and keys.

    Args:
        x: ``[..., n]``, the rank's part of the first, floating.
        y: ``[..., m]``, the rank's part of the second, in x's dtype.
        weight: ``[n]``, the rank's part of the first weight, or None.
        y_weight: ``[m]``, the rank's part of the second weight, or None.
        eps: Added to both means of squares.
        weight_bias: 0 for Llama's form, 1 for Gemma's.
        norm_dtype: Dtype of both results; None for ``x.dtype``.
        group: The process group.
    """
    square, y_square = mean_squares_over_ranks(x, y, group)
    return (
        scale_by_rms(x, square, weight, eps, weight_bias=weight_bias, dtype=norm_dtype),
        scale_by_rms(y, y_square, y_weight, eps, weight_bias=weight_bias, dtype=norm_dtype),
    )
