"""A pool of worker processes in one process group, for tests, `verify` and the demo. POSIX only.

Workers are fresh interpreters, or forks of one that has made their imports, and never forks of the program that started
them. Of that they import only the modules that define the functions passed to `WorkerPool.run`.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, NamedTuple, TypeVar

from fusion_core._torch.distributed import TCPStore
from fusion_core.errors import FusionError
from fusion_core.workers.process import HOST
from fusion_core.workers.worker import GRACE, Worker

__all__ = ["WorkerError", "WorkerPool"]

T = TypeVar("T")


class WorkerError(FusionError):
    """A rank of a `WorkerPool` that raised, died or did not answer in time; the message has its traceback or stack.

    Attributes:
        rank: The rank that failed first; None if the error is not one of a rank.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class WorkerPool:
    """Processes of one process group that stay alive from call to call.

    They start with the first `run`. After a failed `run` all of them are stopped, and the next one starts new ones.
    They end with `close`, with the pool itself, and with this process, however it ends.

    Args:
        world_size: The number of processes.
        backend: The backend of torch.distributed. With ``"nccl"`` rank i uses GPU i.
        timeout: Seconds that a call may take, and that the start may take.
        preload: Modules that start no thread. If there are any, and the backend is ``"gloo"``, workers are forks of a
            process that has imported these modules, which later pools use too. Else they are fresh interpreters.
    """

    def __init__(
        self, world_size: int, *, backend: str = "gloo", timeout: float = 120.0, preload: Sequence[str] = ()
    ) -> None:
        if world_size < 1:
            raise WorkerError(f"world_size is {world_size}, needs at least 1")
        self.world_size = world_size
        self.backend = backend
        self.timeout = timeout
        self.preload = tuple(preload)
        self._workers: list[Worker] = []
        self._store: TCPStore | None = None
        self._closed = False
        self._lock = threading.Lock()

    def run(self, function: Callable[..., T], *args: Any, timeout: float | None = None, **kwargs: Any) -> list[T]:
        """Call a function on every rank at once, with the same arguments.

        Arguments and results are pickled, the function by reference: workers import its module, with this process's
        ``sys.path`` and working directory. ``torch.distributed`` is initialised there, and torch uses one thread.

        Args:
            function: A function of a module (not of ``__main__``, which workers do not have).
            *args: Its arguments.
            timeout: Seconds for this call; None for the pool's timeout.
            **kwargs: Its keyword arguments.

        Returns:
            The results in rank order.

        Raises:
            WorkerError: if a rank raises, dies or does not answer in time, or if something cannot be pickled.
        """
        return self._call(function, args, kwargs, timeout, self._collect)

    def run_each(
        self, function: Callable[..., T], *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> list[T | WorkerError]:
        """Call a function of which some ranks are to fail, and wait for the others.

        The arguments are those of `run`. If a rank fails, all processes are stopped once each rank has ended its call.

        Returns:
            In rank order the results, or how the rank raised, died or did not answer in time.

        Raises:
            WorkerError: if the processes do not start, or if something cannot be pickled.
        """
        return self._call(function, args, kwargs, timeout, self._collect_each)

    def _call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout: float | None,
        collect: Callable[[str, float], list[Any]],
    ) -> list[Any]:
        name = _name(function)
        if getattr(function, "__module__", None) == "__main__":
            raise WorkerError(f"{name} is defined in __main__, needs a module that workers can import")
        try:
            message = pickle.dumps((function, args, kwargs))
        except Exception as error:  # pickle also raises whatever an object's own code raises
            raise WorkerError(f"{name} cannot be sent: {error}, needs what can be pickled") from error
        with self._lock:
            if self._closed:
                raise WorkerError("the pool is closed, needs a new WorkerPool")
            try:
                if not self._workers:
                    self._start()
                for worker in self._workers:
                    with suppress(OSError):  # it died since the last call: `_collect` reports how
                        worker.connection.send_bytes(message)
                return collect(name, self.timeout if timeout is None else timeout)
            except BaseException:
                self._stop(0.0)
                raise

    def close(self) -> None:
        """Stop the processes; a closed pool cannot be used again."""
        with self._lock:
            self._closed = True
            self._stop(GRACE)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self) -> None:
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._finalizer = weakref.finalize(self, _end, self._workers, os.getpid())
        for rank in range(self.world_size):
            self._workers.append(Worker.launch(rank, self.world_size, self.backend, self._store.port, self.preload))
        self._collect("the start of the process group", self.timeout)

    def _stop(self, patience: float) -> None:
        if self._workers:
            self._finalizer.detach()
            _end(self._workers, os.getpid(), patience)
        self._workers = []
        self._store = None

    def _collect(self, doing: str, timeout: float) -> list[Any]:
        """The answers of all ranks; raises an error that names the ranks without one, and why."""
        results, failures, waiting = self._answers(timeout, GRACE)
        if not waiting and not failures:
            return [results[rank] for rank in range(self.world_size)]
        # the peers of a dead rank raise too, and their errors may arrive first
        in_order = sorted(failures, key=lambda rank: not failures[rank].dead)
        first, *others = [*in_order, *(worker.rank for worker in waiting)]
        if failures:
            head = f"rank {first} of {self.world_size} failed in {doing}: it {failures[first].words.rstrip()}"
        else:
            late = ", ".join(str(worker.rank) for worker in waiting)
            head = f"rank {late} of {self.world_size} did not finish {doing} within {timeout:g} s"
            others = [first, *others]
        words = {rank: failure.words for rank, failure in failures.items()} | _stacks(waiting)
        raise WorkerError("\n".join([head, *(f"rank {rank} {words[rank].rstrip()}" for rank in others)]), first)

    def _collect_each(self, doing: str, timeout: float) -> list[Any]:
        """The answers of all ranks, with an error for each that gave none."""
        results, failures, waiting = self._answers(timeout, timeout)
        head = f"of {self.world_size}"
        for rank, failure in failures.items():
            results[rank] = WorkerError(f"rank {rank} {head} failed in {doing}: it {failure.words.rstrip()}", rank)
        for rank, stack in _stacks(waiting).items():
            late = f"rank {rank} {head} did not finish {doing} within {timeout:g} s: it {stack.rstrip()}"
            results[rank] = WorkerError(late, rank)
        if failures or waiting:
            self._stop(0.0)
        return [results[rank] for rank in range(self.world_size)]

    def _answers(self, timeout: float, grace: float) -> tuple[dict[int, Any], dict[int, _Failure], list[Worker]]:
        """Results by rank, failures by rank in order of arrival, and who has not answered.

        Args:
            timeout: Seconds to wait.
            grace: Seconds to wait for the others once one has failed.
        """
        results: dict[int, Any] = {}
        failures: dict[int, _Failure] = {}
        waiting = list(self._workers)
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait([worker.connection for worker in waiting], min(left, 0.1))
            # a grandchild may keep a dead worker's connection open, so the process itself is polled too
            for worker in [worker for worker in waiting if worker.connection in ready or worker.is_gone()]:
                waiting.remove(worker)
                dead = False
                try:
                    if worker.connection not in ready:
                        raise EOFError
                    kind, value = pickle.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):
                    dead = True
                    kind, value = "failure", worker.last_words()
                except Exception:  # noqa: BLE001  # whatever a result's own code raises when it is unpickled
                    kind, value = "failure", f"gave a result that cannot be unpickled\n{traceback.format_exc()}"
                if kind == "result":
                    results[worker.rank] = value
                else:
                    failures[worker.rank] = _Failure(value, dead)
                    deadline = min(deadline, time.monotonic() + grace)
        return results, failures, waiting


class _Failure(NamedTuple):
    """How a rank failed: in words that follow "it", and whether its process ended."""

    words: str
    dead: bool


def _stacks(workers: Iterable[Worker]) -> dict[int, str]:
    """Stop the workers; returns by rank the stack at which each of them was."""
    workers = list(workers)
    for worker in workers:  # all at once, since the end of one changes where the others are
        with suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 2 * GRACE
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(deadline - time.monotonic(), 0.0))
    return {worker.rank: f"was stopped at\n{worker.stack() or '(no stack: it did not react)'}" for worker in workers}


def _end(workers: list[Worker], owner: int, patience: float = 0.0) -> None:
    """Stop processes; kill those that do not exit within ``patience`` seconds after their connection closes."""
    if os.getpid() != owner:
        return  # a fork of the process that owns them
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + patience
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(deadline - time.monotonic(), 0.0))
    for worker in workers:
        worker.signal(signal.SIGKILL)
        worker.process.wait()
        worker.lifeline.close()
        worker.dump.close()
    workers.clear()


def _name(function: Callable[..., Any]) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(function)
