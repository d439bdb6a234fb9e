"""The jobs of the rows of `process_life`: forks in workers, and ranks that are separate processes."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import torch.distributed as dist

from fusion_core._cuda import run_on_own_thread
from fusion_core.agree import ranks as common_ground
from fusion_core.agree.agreement import Agreement, NoAgreement
from tests.faults.rank_jobs import limit, of_group, vote
from tests.odd_registries import of

PATIENCE = 15.0
"""Seconds within which a fork has to answer."""


def said(work: Callable[[], str]) -> str:
    with mock.patch.object(common_ground.warnings, "warn"):
        try:
            return work()
        except NoAgreement as error:
            return f"error: NoAgreement: {error}"


def in_a_fork(work: Callable[[], str]) -> str:
    """The verdict of a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, said(work).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ready = select.select([reading], [], [], PATIENCE)[0]
    answer = os.read(reading, 10_000).decode() if ready else "it waits for ever"
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return answer


def fork(what: str) -> str:
    """A fork of each rank, before or after its first use of the library."""
    group, other = dist.new_group(), dist.new_group()
    if what == "unused":
        return in_a_fork(lambda: of_group(other, of(limit=8)))
    registry = of(limit=1)
    first = said(lambda: of_group(group, registry))
    assert first == "right", first
    if what == "settled":
        return in_a_fork(lambda: of_group(group, registry))
    if what == "new":
        return in_a_fork(lambda: of_group(group, of(limit=2)))
    if what == "vote":
        ours = Agreement(group, "a vote", 60.0)
        return in_a_fork(lambda: vote(ours.outcome(None)))
    if what == "new vote":
        return in_a_fork(lambda: vote(Agreement(group, "a vote", 60.0).outcome(None)))
    if what == "outside":
        run_on_own_thread(lambda: None)
        return in_a_fork(lambda: run_on_own_thread(lambda: "right"))
    if what == "busy":
        return while_busy()
    raise ValueError(what)


def while_busy() -> str:
    """The fork happens while another thread holds the lock of `run_on_own_thread`."""
    begun, end = threading.Event(), threading.Event()

    def work() -> bool:
        begun.set()
        return end.wait(30.0)

    thread = threading.Thread(target=lambda: run_on_own_thread(work))
    thread.start()
    begun.wait()
    found = in_a_fork(lambda: run_on_own_thread(lambda: "right"))
    end.set()
    thread.join()
    return found


# ---- ranks that are separate processes: python -c "from tests.faults.life_jobs import main; main(...)"


def main(job: str, rank: int, port: int) -> None:
    """One of two ranks; prints its verdict."""
    sys.stdout.write(said(lambda: globals()[job](rank, port)))
    sys.stdout.flush()


def begin(rank: int, port: int, store: Any = None) -> dist.ProcessGroup:
    made = dist.TCPStore("127.0.0.1", port, is_master=False) if store is None else store
    dist.init_process_group("gloo", store=made, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def meet(store: Any, number: int) -> None:
    """A barrier through the store: gloo's own barrier would find an earlier group's addresses there."""
    store.add(f"meet {number}", 1)
    while store.add(f"meet {number}", 0) < 2:
        time.sleep(0.01)


def again(rank: int, port: int, change: bool = False, first: tuple[int, ...] = (0, 1)) -> str:
    """A group is destroyed and made again, with the same name and the same store."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    found = []
    for number in range(3):
        group = begin(rank, port, dist.PrefixStore(str(number), store))
        # as in torch when a launcher's store is reused; gloo itself would find its old addresses in it
        dist.distributed_c10d._world.pg_map[group] = ("gloo", dist.PrefixStore("same", store))
        meet(store, 3 * number)
        odd = change and number == 1 and rank == 1
        with limit(1.0 if number == 0 else 20.0):
            if number > 0 or rank in first:
                found.append(of_group(group, of(limit=5) if odd else of()))
        meet(store, 3 * number + 1)
        del group
        dist.destroy_process_group()
        meet(store, 3 * number + 2)
    first_found, *rest = found
    return f"{first_found}{':' if first_found == 'right' else ','} then {', then '.join(rest)}"


def again_changed(rank: int, port: int) -> str:
    return again(rank, port, change=True)


def again_after_one(rank: int, port: int) -> str:
    return again(rank, port, first=(0,))


def killed(rank: int, port: int) -> str:
    """Rank 1 is killed while rank 0 waits."""
    group = begin(rank, port)
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    with limit(2.0):
        return of_group(group, of())


def killed_in_a_vote(rank: int, port: int) -> str:
    group = begin(rank, port)
    ours = Agreement(group, "a vote", 2.0)
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return vote(ours.outcome(None))


def ends(rank: int, port: int) -> str:
    """The main thread of rank 1 ends while another of its threads votes."""
    group = begin(rank, port)
    ours = Agreement(group, "a vote", 60.0)
    if rank == 1:
        threading.Thread(target=run_on_own_thread, args=(lambda: ours.outcome(None),)).start()
        time.sleep(0.3)
        sys.exit(3)
    store = dist.distributed_c10d._get_process_group_store(group)
    while not store.check(["fusion_core/0/1/a vote/1/decision"]):
        time.sleep(0.05)
    return vote(ours.outcome(None))


def exits(rank: int, port: int) -> str:
    """Rank 1 gets Ctrl-C from outside while it waits."""
    group = begin(rank, port)
    if rank == 0:
        time.sleep(1.5)
        with limit(1.0):
            return of_group(group, of())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with limit(60.0):
        return of_group(group, of())
