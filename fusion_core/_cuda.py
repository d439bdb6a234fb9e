"""Helpers for code that runs kernels: is a CUDA graph being captured, which host is this, run on another thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_id() -> str:
    """The boot id of this host: containers on one host share it, whatever their host names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import socket

        return socket.gethostname()


def run_on_own_thread(work: Callable[[], T], lock: AbstractContextManager[Any] | None = None) -> T:
    """Run on a new thread, outside the caller's memory pool, stream and autograd modes.

    Inductor allocates from the graph's memory pool while it warms up a graph. Memory that outlives the graph must not
    come from that pool.

    If the caller is interrupted, the work continues. The next caller waits for the lock and finds the work done.

    Args:
        work: The function to run.
        lock: The new thread holds it while ``work`` runs; None for one lock per process.
    """
    if getattr(_inside, "yes", False):
        return work()
    future: Future[T] = Future()

    def run() -> None:
        _inside.yes = True
        try:
            with _one_at_a_time if lock is None else lock:
                found = work()
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            future.set_exception(error)
        else:
            future.set_result(found)

    # Not a thread pool: after a fork its threads are gone and the child would wait for them. At exit, Python would join
    # them, and nothing would make them stop.
    threading.Thread(target=run, name="fusion_core").start()
    return future.result()


_inside = threading.local()
_one_at_a_time = threading.Lock()


def _in_a_fork() -> None:
    """The parent's threads, one of which may have held the lock, do not exist in the child."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()
    _inside.yes = False


os.register_at_fork(after_in_child=_in_a_fork)
