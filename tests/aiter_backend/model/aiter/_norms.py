"""The sum over the ranks, the residual and the RMSNorm, with the roundings of each kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from aiter._rounding import add_in, cast, flush

WARP = 32
"""Threads that the block reduction counts in, whatever the wavefront."""


def total(shards: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum in float32, in the order given, rounded to ``dtype``."""
    acc = shards[0].float()
    for shard in shards[1:]:
        acc = flush(flush(acc) + flush(shard.float()))
    return cast(acc, dtype)


def residual_sum(a: Tensor, residual: Tensor, *, kernel: str, plain: bool) -> tuple[Tensor, Tensor]:
    """What the norm reads (float32), and the residual that is given back.

    The plain kernels, and FP8's with one stage, norm the float32 sum; FP8's others norm what they have rounded,
    and round that to the nearest everywhere. MXFP4's see `residual_sum_mxfp4`.
    """
    if plain or kernel == "1-stage":
        x = flush(flush(a.float()) + flush(residual.float()))
        return x, cast(x, a.dtype)
    rounded = add_in(a.float(), residual.float(), a.dtype)
    return rounded.float(), rounded


def residual_sum_mxfp4(a: Tensor, residual: Tensor, *, kernel: str) -> tuple[Tensor, Tensor]:
    """As `residual_sum` for MXFP4, whose kernels both norm the rounded sum, but round it differently."""
    if kernel == "1-stage":
        rounded = cast(flush(flush(a.float()) + flush(residual.float())), a.dtype)
    else:
        rounded = add_in(a.float(), residual.float(), a.dtype)
    return rounded.float(), rounded


def counted(n: int, itemsize: int, *, whole: bool) -> int:
    """How many elements of a row the block reduction sees.

    A thread has 16 bytes. The launchers of FP8's kernels with two stages start ``n / pack`` threads and reduce over
    ``threads / 32`` warps, rounded down: a last partial warp is dropped. The others pad the block.
    """
    pack = 16 // itemsize
    return n if whole else n // pack // WARP * WARP * pack


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, gemma: bool, seen: int, weight_first: bool) -> Tensor:
    """``x * rsqrt(mean(x**2) + eps) * w`` in float32.

    Args:
        x: ``[m, n]``, float32.
        weight: ``[n]``, in the input's dtype.
        eps: Is rounded to float32.
        gemma: Whether 1 is added to the weight, in float32.
        seen: How many elements of each row the sum of squares has; it is divided by n all the same.
        weight_first: ``x * w * s`` (plain, two stages) instead of ``x * s * w``.
    """
    x = flush(x)
    squares = flush(x[:, :seen].double().square().sum(-1, keepdim=True).float())
    mean = flush(flush(squares / x.shape[-1]) + torch.tensor(eps, dtype=torch.float32))
    scale = flush(mean.double().rsqrt().float())
    w = flush(weight.float())
    if gemma:
        w = flush(w + 1)
    return flush(flush(x * w) * scale) if weight_first else flush(flush(x * scale) * w)
