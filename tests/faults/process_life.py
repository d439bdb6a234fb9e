"""Forks, groups that are made again, and processes that end while a rank waits."""

from __future__ import annotations

import os
import subprocess
import sys

import torch.distributed as dist

from fusion_core.workers import WorkerPool
from tests.faults import life_jobs
from tests.faults.fault import Fault

FIXTURES = ("two_ranks",)

SOON = 100.0
"""Seconds within which both processes have to end."""


def observe(job: str, two_ranks: WorkerPool, fork: bool = False) -> str:
    """The verdict of both ranks, or that of each if they differ."""
    first, second = two_ranks.run(life_jobs.fork, job, timeout=60.0) if fork else _processes(job)
    return first if first == second else f"{first} || {second}"


def _processes(job: str) -> tuple[str, str]:
    """The output of each of two processes, or its exit status if it prints nothing."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    code = "import sys; from tests.faults.life_jobs import main; main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, job, str(rank), str(store.port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=SOON)[0].strip() for process in running]
    finally:
        for process in running:
            process.kill()
    first, second = (text or f"exit: {process.returncode}" for text, process in zip(said, running, strict=True))
    return first, second


def _fork(what: str, fault: str, expected: str) -> Fault:
    return Fault("process_life", f"fork: {what}", fault, expected, {"job": what, "fork": True})


def _row(name: str, fault: str, expected: str, job: str) -> Fault:
    return Fault("process_life", name, fault, expected, {"job": job}, slow=True)


FORKED = "error: NoAgreement: this process is a fork of the one that made process group .*, needs groups of its own; .*"
NEVER = "unfused: (nothing is fused: )?rank {} did not take part in .*"

ROWS = (
    _fork("unused", "a fork before the first use, after the groups were made", FORKED),
    _fork("settled", "a fork asks for what is settled", "right"),
    _fork("new", "a fork after the first use asks for something new", FORKED),
    _fork("vote", "a fork takes part in a vote of its parent", FORKED),
    _fork("new vote", "a fork begins a vote", FORKED),
    _fork("outside", "a fork works outside, as its parent did", "right"),
    _fork("busy", "a fork while a thread of the parent holds the lock", "right"),
    _row("again: the same", "a group is made again under its name", "right: then right, then right", "again"),
    _row(
        "again: changed",
        "a rank has another configuration in the second group of a name, and not in the third",
        "right: then unfused: .*has limit=5, rank 0 has limit=None.*, then right",
        "again_changed",
    ),
    _row(
        "again: after one",
        "one rank alone asked in the first group of a name",
        rf"{NEVER.format(1)}, then right, then right \|\| right: then right",
        "again_after_one",
    ),
    _row("killed", "rank 1 is killed while rank 0 waits", rf"{NEVER.format(1)} \|\| exit: -9", "killed"),
    _row("killed: vote", "the same in a vote", rf"{NEVER.format(1)} \|\| exit: -9", "killed_in_a_vote"),
    _row(
        "end: vote",
        "rank 1's main thread ends in a vote",
        r"unfused: a process ended while it waited for rank 0 in a vote.* \|\| exit: 3",
        "ends",
    ),
    _row("end: Ctrl-C", "rank 1 is interrupted from outside", r"right \|\| exit: (-2|130|1)", "exits"),
)
