"""How one of AITER's communicators is made, measured and given back."""

from __future__ import annotations

import functools
import gc
import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
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
from fusion_core import Device, Reason
from fusion_core.agree import agreement
from fusion_core.agree.agreement import Agreement, NoAgreement
from fusion_core.workspaces.per_group import host, synchronize

ARRIVAL = 900.0
"""Seconds for all ranks to come to their first call: one may still compile its model, or build AITER's kernels."""

STEP = 90.0
"""Seconds for each later step, and for each of AITER's own exchanges."""

BUILT = 4 * STEP
"""Seconds for all ranks to have made their communicator, which exchanges handles of three buffers."""

CLOSING = 5.0
"""Seconds for all ranks to give a communicator back together."""

SETTINGS = ("AITER_CUSTOM_AR_MAX_SIZE", "AITER_CUSTOM_AR_MIN_SIZE")
"""Of the environment, read by AITER: which sizes it takes."""

RANK_DATA = 8 << 20
"""Bytes that a communicator takes beside its buffers."""

MARGIN = 64 << 20
"""Bytes that are left to others: HIP rounds allocations that are shared between GPUs."""


class Made(NamedTuple):
    """A communicator, the gloo group that it was made over, and how its ranks agree to close it."""

    communicator: Any
    group: dist.ProcessGroup
    closing: Agreement
    memory: int


def facts(device: torch.device, max_size: int) -> tuple[dict[str, Any], Reason | None]:
    """What ranks compare and exchange, and why this rank cannot make a communicator.

    Imports AITER, and builds its kernels where they are not built yet.
    """
    found: dict[str, Any] = {"max_size": max_size, "host": host(), "gpu": None, "index": device.index}
    found |= {"arch": "", "release": "", "made": 0, "token": uuid.uuid4().hex}
    found |= {name: os.environ.get(name, "") for name in SETTINGS}
    if (store := _default_store()) != "TCPStore":
        return found, Reason(
            "store",
            f"the default process group meets over a {store}",
            "a TCPStore, through which AITER exchanges its handles",
            hint="start with torchrun, or init_process_group(init_method='tcp://...')",
        )
    try:
        found |= {"arch": Device.of(device).arch, "release": _release()}
        library.module()
        found["made"] = library.communicators_made() or 0
        if device.type == "cuda":
            torch.cuda.set_device(device)
            found["gpu"] = _uuid(device.index)
            size = memory(max_size)
            if torch.cuda.mem_get_info(device)[0] < size + MARGIN:
                torch.cuda.empty_cache()
            if (free := torch.cuda.mem_get_info(device)[0]) < size + MARGIN:
                return found, Reason(
                    "memory",
                    f"{free >> 20} MiB of GPU memory are free, and the communicator takes {size >> 20} MiB",
                    "more free memory",
                    hint="leave the model's allocator less, or set FusionConfig(max_tokens=...)",
                )
    except Exception as error:  # noqa: BLE001  # an import or a build fails in any way; the other ranks must hear of it
        return found, Reason(
            "import",
            f"importing aiter raised {type(error).__name__}: {error}",
            "an AITER that imports here",
            hint="python -c 'import aiter' shows it whole",
        )
    return found, None


def disagreement(ranks: Sequence[dict[str, Any]]) -> Reason | None:
    """What differs between ranks that must not, or is the same and must not be."""
    same = ("call", "max_size", "arch", "release", *SETTINGS)
    return agreement.disagreement(ranks, same, "the same graphs, AITER, settings and GPUs on all ranks")


def unreachable(device: torch.device, ranks: Sequence[dict[str, Any]]) -> Reason | None:
    """Why this rank's GPU cannot read another rank's: AITER takes it for granted.

    A GPU that this process cannot see, as where each has one alone, cannot be asked about.
    """
    if device.type != "cuda":
        return None
    visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
    for number, rank in enumerate(ranks):
        other = visible.get(rank["gpu"], device.index)
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            return Reason(
                "peers", f"GPU {device.index} cannot access GPU {other}, that of rank {number}", "linked GPUs"
            )
    return None


def create(group: dist.ProcessGroup, device: torch.device, max_size: int, ranks: Sequence[dict[str, Any]]) -> Made:
    """AITER's communicator; all ranks of the group call it together.

    Raises:
        RuntimeError: where AITER made one that cannot be used.
        Exception: whatever AITER raises.
    """
    _warn_of_runtime()
    module = library.module()
    # Handles are exchanged under the number of communicators that a process has made; ranks that are also in other
    # groups may have made more of them, and would wait for each other for ever.
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

    Twice ``max_size`` behind its signals, once for copies of inputs (``custom_all_reduce.py``, ``_init_ipc``).
    """
    return 3 * max_size + RANK_DATA


def free(made: Made) -> None:
    """Give a communicator's memory back, once no rank can be in a kernel that reads it.

    Where a rank does not come, it is kept until the process ends: a peer that still reads it would be ended by the
    driver.
    """
    synchronize(made.communicator.device)
    try:
        reason = made.closing.outcome(None)
    except (RuntimeError, NoAgreement):  # the store went with its process
        reason = Reason("agreement", "the ranks' store is gone")
    if reason is not None:
        _left_open.append(made)
        return
    made.communicator.close()
    with suppress(ValueError, RuntimeError, AssertionError):  # destroyed with the default group
        dist.destroy_process_group(made.group)
    gc.collect()


_left_open: list[Made] = []


def _gloo_group(group: dist.ProcessGroup, name: str) -> dist.ProcessGroup:
    """A gloo group of the same ranks, made by them alone: AITER refuses NCCL, and must not meet the model's traffic.

    `torch.distributed.new_group` with local synchronisation would call it after the number of groups that this process
    is in. Ranks in other numbers of groups would wait for each other under two names, and a group that follows one that
    was destroyed would read that one's addresses from the store.

    Args:
        group: Whose ranks.
        name: The same on all ranks, and never used before.
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

    Where another rank raises halfway, this one would wait as long as the process group's own limit, and torch's
    watchdog end it.
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


def _default_store() -> str:
    """The class of the default process group's store, behind its prefixes."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return type(store).__name__


def _release() -> str:
    """What is installed, as far as it says."""
    source = installed()
    found = release_of(source) if isinstance(source, Source) else "none"
    with suppress(PackageNotFoundError):
        found += f" ({version('amd-aiter')})"
    return found


def _uuid(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return str(getattr(properties, "uuid", index))
