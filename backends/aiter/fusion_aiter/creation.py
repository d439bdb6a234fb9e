"""How one of AITER's communicators is made, measured and given back."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from fusion_aiter import library
from fusion_aiter.availability import known_bad_runtime, release_of
from fusion_aiter.source import Source, installed
from fusion_core import Reason
from fusion_core.workspaces import Agreement, NoAgreement

STEP = 90.0
"""Seconds for each later step, and for each of AITER's own exchanges."""

CLOSING = 5.0
"""Seconds for all ranks to give a communicator back together."""

RANK_DATA = 8 << 20
"""Bytes that a communicator takes besides its buffers."""


class Made(NamedTuple):
    """A communicator, the gloo group that it was made over, and how its ranks agree to close it."""

    communicator: Any
    group: dist.ProcessGroup
    closing: Agreement
    memory: int


def create(group: dist.ProcessGroup, device: torch.device, max_size: int, ranks: Sequence[Mapping[str, Any]]) -> Made:
    """Make AITER's communicator. All ranks of the group call it together.

    Raises:
        RuntimeError: if AITER made one that cannot be used.
        Exception: any that AITER raises.
    """
    _warn_of_runtime()
    module = library.module()
    # AITER exchanges handles under the number of communicators that a process has made. Ranks that are also in other
    # groups may have made more of them, and would wait for each other forever.
    if len({rank["made"] for rank in ranks}) > 1:
        module.IPCBufferPool._pool_seq = max(rank["made"] for rank in ranks)
    own = _gloo_group(group, f"fusion_aiter {ranks[0]['token']}")
    with _waits_of_the_default_store(STEP):
        communicator = module.CustomAllreduce(
            group=own, device=device, max_size=max_size, enable_register_for_capturing=False
        )
    if getattr(communicator, "disabled", True):
        raise RuntimeError("AITER disabled its communicator; its log (the logger 'aiter') says why")
    return Made(communicator, own, Agreement(own, "closing a communicator (aiter)", CLOSING), memory(max_size))


def memory(max_size: int) -> int:
    """Bytes of device memory that a communicator takes on each rank.

    Twice ``max_size`` after its signals, and once for copies of inputs (``custom_all_reduce.py``, ``_init_ipc``).
    """
    return 3 * max_size + RANK_DATA


def free(made: Made) -> None:
    """Give a communicator's memory back when no rank can be in a kernel that reads it.

    If a rank does not come, the memory is kept until the process ends: the driver would end a peer that reads freed
    memory.
    """
    if (device := made.communicator.device).type == "cuda":
        torch.cuda.synchronize(device)
    try:
        reason = made.closing.outcome(None)
    except (RuntimeError, NoAgreement):  # the store ended with its process
        reason = Reason("agreement", "the ranks' store is gone")
    if reason is not None:
        _left_open.append(made)
        return
    made.communicator.close()
    with suppress(ValueError, RuntimeError, AssertionError):  # already destroyed, with the default group
        dist.destroy_process_group(made.group)
    gc.collect()


_left_open: list[Made] = []


def _gloo_group(group: dist.ProcessGroup, name: str) -> dist.ProcessGroup:
    """A gloo group of the same ranks, made only by them. AITER refuses NCCL, and must not use the model's own group.

    `torch.distributed.new_group` with local synchronisation names a group by the number of groups that this process is
    in. Ranks in different numbers of groups would wait under different names, and a group made after the destruction of
    another one would read that one's addresses from the store.

    Args:
        group: The group with these ranks.
        name: The new group's name, the same on all ranks and never used before.
    """
    torch_groups: Any = dist.distributed_c10d
    members = dist.get_process_group_ranks(group)
    made, _ = torch_groups._new_process_group_helper(
        len(members),
        group.rank(),
        members,
        dist.Backend("gloo"),
        torch_groups._get_default_store(),
        name,
        timeout=timedelta(seconds=STEP),
    )
    assert isinstance(made, dist.ProcessGroup)
    torch_groups._world.pg_group_ranks[made] = {member: rank for rank, member in enumerate(members)}
    return made


@contextmanager
def _waits_of_the_default_store(seconds: float) -> Iterator[None]:
    """A shorter time limit for the store through which AITER exchanges handles.

    Without it, if another rank raised halfway, this one would wait for the process group's own limit, and torch's
    watchdog would end it.
    """
    store = dist.distributed_c10d._get_default_store()
    before: timedelta = store.timeout  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        store.set_timeout(before)


@functools.cache
def _warn_of_runtime() -> None:
    if text := known_bad_runtime():
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def default_store() -> str:
    """The class name of the default process group's store, without the prefixes around it."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return type(store).__name__


def release() -> str:
    """The installed release, by its signatures and its metadata."""
    source = installed()
    found = release_of(source) if isinstance(source, Source) else "none"
    with suppress(PackageNotFoundError):
        found += f" ({version('amd-aiter')})"
    return found
