"""Calls of the model of AITER from a test: the same on every rank, with inputs that are easy to write down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_core.workers import WorkerPool
from tests.aiter_backend import model_jobs as jobs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CALLS = {
    "plain": ("fused_ar_rms", {}),
    "token_fp8": ("fused_ar_rms", {"post_per_token_quant": True}),
    "group_fp8": ("fused_ar_rms_per_group_quant", {}),
    "mxfp4": ("fused_ar_rms_mxfp4_quant", {}),
}


def run(
    pool: WorkerPool,
    arch: str,
    kind: str,
    shards: list[Tensor],
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    **flags: Any,
) -> Any:
    """What a fused call gives, FP8 as bytes, or what it raises as text; ranks without a shard add zeros."""
    method, fixed = CALLS[kind]
    shards = [*shards, *[torch.zeros_like(shards[0])] * (pool.world_size - len(shards))]
    return same_everywhere(pool.run(jobs.call, arch, method, shards, residual, w=weight, eps=eps, **fixed, **flags))


def same_everywhere(answers: list[Any]) -> Any:
    """The answer of all ranks: the same bits."""
    first = answers[0]
    for other in answers[1:]:
        assert type(first) is type(other)
        if isinstance(first, str):
            assert first == other
            continue
        for a, b in zip(first, other, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    return first


def full(value: float, n: int = 512, dtype: torch.dtype = BF16, m: int = 1) -> Tensor:
    """A matrix of one number."""
    return torch.full((m, n), value, dtype=dtype)


def ones(n: int = 512, dtype: torch.dtype = BF16) -> Tensor:
    """A weight that changes nothing."""
    return torch.ones(n, dtype=dtype)


def normed(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm in float64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
