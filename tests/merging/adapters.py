"""What the workers of `test_adapters` do: a row-parallel layer with a LoRA adapter, fused or not, against float64."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core import Report
from tests.corpus.case import norm
from tests.merging.jobs import Errors, compiled, errors, given, total
from tests.support.collectives import reaching_the_group

RANK = 8


def layer(r: Tensor, w: Tensor, x: Tensor, y: Tensor, b: Tensor) -> Any:
    """The adapter's first matrix is split like the layer's; its second one, ``b``, is whole on every rank."""
    h = r + (total(x) + 2.0 * (total(y) @ b))
    return norm(h, w), h


def tensors(seed: int, rank: int) -> tuple[Tensor, ...]:
    r, w, x, y, _ = given(seed, rank)
    second = torch.randn(RANK, w.shape[0], generator=torch.Generator().manual_seed(seed)) / RANK
    return r, w, x, y[:, :RANK].contiguous(), second.bfloat16()


def exact(seed: int) -> tuple[Tensor, Tensor]:
    ranks = [[tensor.double() for tensor in tensors(seed, rank)] for rank in range(dist.get_world_size())]
    r, w, *_, b = ranks[0]
    h = r + sum(each[2] for each in ranks) + 2.0 * (sum(each[3] for each in ranks) @ b)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * w, h


def run(merge: bool) -> tuple[Report, int, list[Errors], list[Errors]]:
    """The report, the all_reduces of a call, and errors of 20 seeds: compiled, and as the model is written."""
    rank, reports = dist.get_rank(), []
    call = compiled(layer, merge, reports)
    found = [errors(call(*tensors(seed, rank)), exact(seed)) for seed in range(20)]
    calls = reaching_the_group(functools.partial(call, *tensors(0, rank)))["all_reduce"]
    return reports[0], calls, found, [errors(layer(*tensors(seed, rank)), exact(seed)) for seed in range(20)]
