"""Norms of vectors that are split over the ranks: an all_reduce of one number a token, instead of an all_gather."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core import process_group
from fusion_core.vocabulary import scale_by_rms


def _mean_squares(group: str, *parts: Tensor) -> tuple[Tensor, ...]:
    """The means of squares of whole vectors, ``[..., 1]`` in float32 each, by one all_reduce for all of them."""
    squares = []
    for part in parts:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        squares.append(wide.pow(2).mean(-1, keepdim=True))
    means = torch.cat(squares, -1) if len(squares) > 1 else squares[0]
    # divided first: the sum of the ranks' means may exceed float32 where their mean does not
    means = means / process_group(group).size()
    means = torch.ops._c10d_functional.all_reduce(means.contiguous(), "sum", group)
    means = torch.ops._c10d_functional.wait_tensor(means)
    return means.split(1, -1) if len(squares) > 1 else (means,)


def all_gather_shard(x: Tensor, *, group: str) -> Tensor:
    """The part that the rank has already; nothing is sent."""
    return x.clone(memory_format=torch.contiguous_format)


def sharded_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> Tensor:
    """One number a token is sent."""
    (square,) = _mean_squares(group, x)
    normed: Tensor = scale_by_rms(x, square, weight, eps, weight_bias=weight_bias, dtype=norm_dtype)
    return normed


def sharded_rms_norm_pair(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    y_weight: Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    norm_dtype: torch.dtype | None = None,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Two numbers a token are sent, in one all_reduce."""
    square, y_square = _mean_squares(group, x, y)
    return (
        scale_by_rms(x, square, weight, eps, weight_bias=weight_bias, dtype=norm_dtype),
        scale_by_rms(y, y_square, y_weight, eps, weight_bias=weight_bias, dtype=norm_dtype),
    )


SHARDED: Mapping[str, Callable[..., Any]] = {
    function.__name__: function for function in (all_gather_shard, sharded_rms_norm, sharded_rms_norm_pair)
}
"""Pattern → the function that sends less than its definition."""
