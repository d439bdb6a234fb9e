"""One call of an operator, compared with float64; on the GPU where the process group is NCCL's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core.patterns.plain import all_reduce
from fusion_core.workspaces.self_check import distance
from fusion_reference.ops import OPERATORS


def device() -> torch.device:
    """This rank's."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def world() -> str:
    """The default group's name."""
    return str(dist.group.WORLD.group_name)


def given(shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
    """This rank's part of a sum."""
    generator = torch.Generator(device()).manual_seed(rank + 7 * shape[0])
    return torch.randn(shape, generator=generator, device=device()).to(dtype)


def off(x: Tensor, found: Tensor, group: str | None = None) -> float:
    """How far a result is from float64, in units of what its dtype allows."""
    exact = all_reduce.function(x.double(), group=group or world())
    if (found.shape, found.dtype, found.is_contiguous()) != (x.shape, x.dtype, True):
        return float("inf")
    return distance(
        all_reduce, {"reduced": found.reshape(-1, x.shape[-1])}, {"reduced": exact.reshape(-1, x.shape[-1])}, {}
    )


def run(
    kernel: str,
    tokens: int = 4,
    hidden: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    *,
    group: str | None = None,
    max_tokens: int | None = None,
    lead: tuple[int, ...] = (),
) -> float:
    """One call of an operator on an input of its own: how far it is off."""
    group = group or world()
    rank = dist.distributed_c10d._resolve_process_group(group).rank()
    x = given((*(lead or (tokens,)), hidden), dtype, rank)
    before = x.clone()
    found = OPERATORS[kernel](x, group, max_tokens)
    assert torch.equal(x, before), "an input was written"
    return off(x, found, group)
