"""What the GPUs do to each other: meeting at a barrier, and reading one another's memory."""

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds after which a rank that has not come is taken never to come."""
WORD = 1024
"""Bytes that a rank's word may have: gloo gathers tensors of one size."""
FOR_EVER = "the kernels would wait for each other for ever"


def agree(group: Any, prepare: Callable[[], tuple[Any, T]]) -> T:
    """Prepare a call on every rank, and go on only if they all make the same one.

    Args:
        group: The ranks.
        prepare: Gives what decides which kernel waits for which, and anything else; may refuse by raising.

    Returns:
        The second thing that ``prepare`` gave.

    Raises:
        Exception: What this rank's ``prepare`` raised.
        AssertionError: The ranks make different calls, one of them refuses alone, or one does not come.
    """
    refusal: Exception | None = None
    call: Any = None
    kept: Any = None
    try:
        call, kept = prepare()
    except Exception as error:  # noqa: BLE001  # is raised below, once the others know
        refusal = error
    mine = f"refused: {type(refusal).__name__}" if refusal else str(call)
    everyone = meet(group, mine)
    if refusal:
        raise refusal
    if len(set(everyone)) > 1:
        raise AssertionError(f"{FOR_EVER}: " + "; ".join(f"rank {rank}: {it}" for rank, it in enumerate(everyone)))
    return kept  # type: ignore[no-any-return]


def meet(group: Any, mine: T) -> list[T]:
    """Everyone's word, in the order of the ranks."""
    raw = pickle.dumps(mine).ljust(WORD, b"\0")
    shards = [torch.empty(WORD, dtype=torch.uint8) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(shards, torch.tensor(list(raw), dtype=torch.uint8), group, async_op=True)
    try:
        work.wait(timedelta(seconds=PATIENCE))
    except RuntimeError as error:
        raise AssertionError(f"{FOR_EVER}: not every rank came ({error})") from error
    return [pickle.loads(bytes(shard.tolist())) for shard in shards]


def gather(group: Any, x: Tensor) -> Sequence[Tensor]:
    """Every rank's copy of a tensor, bit for bit."""
    raw = x.contiguous().view(torch.uint8)
    shards = [torch.empty_like(raw) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, raw, group)
    return [shard.view(x.dtype) for shard in shards]
