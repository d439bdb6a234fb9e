"""Vectors that are split over the ranks: an all_reduce of one number a token or nothing, instead of an all_gather."""

from __future__ import annotations

import torch
from torch import Tensor


def all_gather_shard(x: Tensor, *, group: str) -> Tensor:
    """The part that the rank has already; nothing is sent."""
    return x.clone(memory_format=torch.contiguous_format)


def all_reduce_means(x: Tensor, *, group: str) -> Tensor:
    """The sum of x over the ranks, in x."""
    torch.ops._c10d_functional.all_reduce_(x, "sum", group)
    torch.ops._c10d_functional.wait_tensor(x)
    return x


SHARDED = {
    "all_gather_shard": all_gather_shard,
    "sharded_rms_norm": all_reduce_means,
    "sharded_rms_norm_pair": all_reduce_means,
}
"""Pattern → the function that sends less than its definition."""
