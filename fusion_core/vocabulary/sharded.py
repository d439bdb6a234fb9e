"""Words for vectors of which each rank has one of several equal parts, in the order of the ranks.

Their definitions gather the whole vector, as models do that were written without tensor parallelism in mind. A strategy
needs to send less: the mean of squares needs one number of each rank.
"""

from __future__ import annotations

import torch

from fusion_core._torch.distributed import own_rank, size_of
from fusion_core.vocabulary.operation import operation


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.pow(2).mean(-1, keepdim=True)


def _mean_squares(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _mean_square(x), _mean_square(y)


def _whole(x: torch.Tensor, group: str) -> torch.Tensor:
    """The ranks' parts one after another along the last dimension."""
    ranks = size_of(group)
    parts = (x if x.dim() > 1 else x.reshape(1, -1)).contiguous()  # NCCL takes nothing else
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(parts, ranks, group)
    gathered = torch.ops._c10d_functional.wait_tensor(gathered)
    whole = torch.cat(gathered.chunk(ranks), -1)
    return whole if x.dim() > 1 else whole.reshape(-1)


@operation(results=("shard",), alone=_copy, by_rank=True)
def all_gather_shard(x: torch.Tensor, group: str) -> torch.Tensor:
    """The rank's own part of the vectors that an all_gather makes whole, which is ``x``.

    Args:
        x: ``[..., n]``, the rank's part; any dtype, shape and dtype equal on all ranks.
        group: The process group's name in `torch.distributed`.

    Returns:
        ``[..., n]``, equal to ``x``.
    """
    start = own_rank(group) * x.shape[-1]
    return _whole(x, group)[..., start : start + x.shape[-1]].contiguous()


@operation(results=("mean_square",), alone=_mean_square, by_rank=True)
def mean_square_over_ranks(x: torch.Tensor, group: str) -> torch.Tensor:
    """The mean of squares of vectors that are split over the ranks.

    Args:
        x: ``[..., n]``, the rank's part; floating, shape and dtype equal on all ranks.
        group: The process group's name in `torch.distributed`.

    Returns:
        ``[..., 1]`` in float32 (in float64 for float64), the same on every rank: the mean over ``n`` times the number
        of ranks.
    """
    return _mean_square(_whole(x, group))


@operation(results=("mean_square", "y_mean_square"), alone=_mean_squares, by_rank=True)
def mean_squares_over_ranks(x: torch.Tensor, y: torch.Tensor, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of squares of two vectors a token, such as queries and keys, that are split over the ranks.

    Args:
        x: ``[..., n]``, the rank's part of the first; floating, shape and dtype equal on all ranks.
        y: ``[..., m]``, the rank's part of the second; the same leading sizes as ``x``.
        group: The process group's name in `torch.distributed`.

    Returns:
        Of each, `mean_square_over_ranks`.
    """
    return _mean_square(_whole(x, group)), _mean_square(_whole(y, group))


@operation(results=("normed",))
def scale_by_rms(
    x: torch.Tensor,
    mean_square: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """RMSNorm with a mean of squares that is known: ``x * rsqrt(mean_square + eps) * (weight + weight_bias)``.

    Computed in float32 (in float64 for float64) and rounded once at the end. Source: as `rms_norm`.

    Args:
        x: ``[..., n]``, any floating dtype.
        mean_square: ``[..., 1]``.
        weight: ``[n]``, or None for no weight (``weight_bias`` is then ignored).
        eps: Added to the mean of squares.
        weight_bias: Added to the weight.
        dtype: Dtype of the result; None for ``x.dtype``.

    Returns:
        ``[..., n]`` in ``dtype``.
    """
    wide = x.to(mean_square.dtype)
    normed = wide * torch.rsqrt(mean_square + eps)
    if weight is not None:
        scale = weight.to(wide.dtype)
        normed = normed * (scale + weight_bias if weight_bias else scale)
    return normed.to(x.dtype if dtype is None else dtype)
