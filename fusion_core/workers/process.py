"""A worker's side of a `fusion_core.workers.pool.WorkerPool`: join the process group, answer calls."""

from __future__ import annotations

import faulthandler
import fcntl
import functools
import os
import pickle
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from fusion_core._torch.distributed import TCPStore

HOST = "127.0.0.1"
_COLLECTIVE_TIMEOUT = timedelta(hours=6)  # above the parent's timeout, which can report where a rank hangs


def serve(*, rank: int, world_size: int, backend: str, port: int, handles: list[int]) -> None:
    """Run a worker: join the process group, then answer calls until the connection closes. Does not return."""
    calls, lifeline, dump = handles
    for handle in handles:
        os.set_inheritable(handle, False)
    _die_with(lifeline)
    faulthandler.enable(dump)  # for crashes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.register(signal.SIGTERM, dump, all_threads=True, chain=True)  # dump the stacks, then exit
    connection = Connection(calls)

    def join() -> None:
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        store = TCPStore(HOST, port, is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_COLLECTIVE_TIMEOUT)

    connection.send_bytes(_answer(join))
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            break
        with suppress(BrokenPipeError):
            connection.send_bytes(_answer(functools.partial(_call, message)))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without destroy_process_group, which can wait forever while CUDA graphs hold NCCL's work.
    os._exit(0)


def _die_with(lifeline: int) -> None:
    """Have the operating system end this process by SIGIO when the other end closes, whatever Python is doing."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        os._exit(1)  # it is already closed


def _call(message: bytes) -> Any:
    function, args, kwargs = pickle.loads(message)
    return function(*args, **kwargs)


def _answer(call: Callable[[], Any]) -> bytes:
    """The result of a call, or the traceback of its error, pickled."""
    did = "raised"
    try:
        result = call()
        did = "gave a result that cannot be pickled"
        return pickle.dumps(("result", result))
    except BaseException:  # noqa: BLE001  # SystemExit too: the parent gets it, and this process waits for the next call
        return pickle.dumps(("failure", f"{did}\n{traceback.format_exc()}"))
