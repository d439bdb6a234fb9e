"""A pool of worker processes in one process group, for tests, `verify` and the demo. POSIX only.

Workers are fresh interpreters, not forks, and import nothing of the program that started them but the modules that
the functions given to `WorkerPool.run` live in.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import IO, Any, TypeVar

from torch._C._distributed_c10d import TCPStore

from fusion_core.errors import FusionError
from fusion_core.workers.process import HOST

__all__ = ["WorkerError", "WorkerPool"]

T = TypeVar("T")

GRACE = 1.0
"""Seconds that other ranks get to speak or die, once one has failed."""
_BOOTSTRAP = """
import json, sys
setup = json.loads(sys.argv[1])
sys.path[:] = setup.pop("path")
from fusion_core.workers.process import serve
serve(**setup)
"""


class WorkerError(FusionError):
    """A rank of a `WorkerPool` that raised, died or did not answer in time; the text holds its traceback or stack.

    Attributes:
        rank: The rank that failed first; None where no rank is to blame.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class WorkerPool:
    """Processes of one process group that stay alive from call to call.

    They start with the first `run`. After a failed one all of them are stopped, and the next `run` starts new ones.
    They end with `close`, with the pool itself, and with this process, however it ends.

    Args:
        world_size: How many processes.
        backend: Of torch.distributed. With ``"nccl"`` each rank takes the GPU of its own number.
        timeout: Seconds that a call may take, and that starting may take.
    """

    def __init__(self, world_size: int, *, backend: str = "gloo", timeout: float = 120.0) -> None:
        if world_size < 1:
            raise WorkerError(f"world_size is {world_size}, needs at least 1")
        self.world_size = world_size
        self.backend = backend
        self.timeout = timeout
        self._workers: list[_Worker] = []
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
            timeout: Seconds for this call; None for the pool's.
            **kwargs: Its keyword arguments.

        Returns:
            The results, in the order of the ranks.

        Raises:
            WorkerError: where a rank raises, dies or does not answer in time, or where something cannot be pickled.
        """
        name = _name(function)
        if getattr(function, "__module__", None) == "__main__":
            raise WorkerError(f"{name} is defined in __main__, needs a module that workers can import")
        try:
            message = pickle.dumps((function, args, kwargs))
        except Exception as error:  # pickle raises whatever an object's own code raises
            raise WorkerError(f"{name} cannot be sent: {error}, needs what can be pickled") from error
        with self._lock:
            if self._closed:
                raise WorkerError("the pool is closed, needs a new WorkerPool")
            try:
                if not self._workers:
                    self._start()
                for worker in self._workers:
                    with suppress(OSError):  # it died since the last call: `_collect` says how
                        worker.connection.send_bytes(message)
                return self._collect(name, self.timeout if timeout is None else timeout)
            except BaseException:
                self._stop(0.0)
                raise

    def close(self) -> None:
        """Stop the processes; a closed pool runs nothing."""
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
            self._workers.append(_Worker.launch(rank, self.world_size, self.backend, self._store.port))
        self._collect("the start of the process group", self.timeout)

    def _stop(self, patience: float) -> None:
        if self._workers:
            self._finalizer.detach()
            _end(self._workers, os.getpid(), patience)
        self._workers = []
        self._store = None

    def _collect(self, doing: str, timeout: float) -> list[Any]:
        """One answer of each rank, or the error that says which ranks gave none, and why."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}  # in the order in which they became known
        dead: list[int] = []
        waiting = list(self._workers)
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait([worker.connection for worker in waiting], min(left, 0.1))
            # a grandchild may hold a dead worker's connection open: ask the process itself as well
            for worker in [worker for worker in waiting if worker.connection in ready or worker.is_gone()]:
                waiting.remove(worker)
                try:
                    if worker.connection not in ready:
                        raise EOFError
                    kind, value = pickle.loads(worker.connection.recv_bytes())
                except (EOFError, OSError):
                    dead.append(worker.rank)
                    kind, value = "failure", worker.last_words()
                except Exception:  # noqa: BLE001  # whatever a result's own code raises when it is unpickled
                    kind, value = "failure", f"gave a result that cannot be unpickled\n{traceback.format_exc()}"
                if kind == "result":
                    results[worker.rank] = value
                else:
                    failures[worker.rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE)
        if not waiting and not failures:
            return [results[rank] for rank in range(self.world_size)]
        # peers of a dead rank raise as well, and may be heard first
        first, *others = [*dead, *(rank for rank in failures if rank not in dead), *(worker.rank for worker in waiting)]
        if failures:
            head = f"rank {first} of {self.world_size} failed in {doing}: it {failures[first].rstrip()}"
        else:
            late = ", ".join(str(worker.rank) for worker in waiting)
            head = f"rank {late} of {self.world_size} did not finish {doing} within {timeout:g} s"
            others = [first, *others]
        stacks = _stacks(waiting)
        tail = [f"rank {rank} {(failures.get(rank) or stacks[rank]).rstrip()}" for rank in others]
        raise WorkerError("\n".join([head, *tail]), first)


@dataclass(eq=False)
class _Worker:
    """One process as its parent sees it.

    Attributes:
        rank: Its rank.
        process: The process, leader of its own session: what it started can be stopped with it.
        connection: Carries calls and answers.
        lifeline: Never carries anything; its closing, by whatever end of this process, ends the worker.
        dump: Where faulthandler writes stacks.
    """

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection
    lifeline: socket.socket
    dump: IO[bytes]

    @classmethod
    def launch(cls, rank: int, world_size: int, backend: str, port: int) -> _Worker:
        ours, theirs = socket.socketpair()
        lifeline, its_lifeline = socket.socketpair()
        dump = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        handles = [theirs.fileno(), its_lifeline.fileno(), dump.fileno()]
        setup = {"rank": rank, "world_size": world_size, "backend": backend, "port": port, "handles": handles}
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, json.dumps({"path": _path(), **setup})],
            stdin=subprocess.DEVNULL,
            env=_environment(),
            pass_fds=handles,
            start_new_session=True,
        )
        theirs.close()
        its_lifeline.close()
        return cls(rank, process, Connection(ours.detach()), lifeline, dump)

    def is_gone(self) -> bool:
        """Whether the process has ended and left no answer."""
        return self.process.poll() is not None and not self.connection.poll()

    def last_words(self) -> str:
        """How the process ended, and the stack that it may have left."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        return f"{how}\n{self.stack()}".rstrip()

    def stack(self) -> str:
        """What faulthandler has written."""
        self.dump.seek(0)
        return str(self.dump.read().decode(errors="replace"))

    def signal(self, number: int) -> None:
        """Send a signal to the process and to all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def _path() -> list[str]:
    """This process's path, for another one: with the working directory, by its name."""
    return [*(entry or os.getcwd() for entry in sys.path), *([] if os.getcwd() in sys.path else [os.getcwd()])]


def _environment() -> dict[str, str]:
    """A worker's environment."""
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    return environment


def _stacks(workers: Iterable[_Worker]) -> dict[int, str]:
    """Where each of these hangs, by rank; the processes end by it."""
    workers = list(workers)
    for worker in workers:  # all at once: the end of one would move the others
        with suppress(ProcessLookupError):
            worker.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 2 * GRACE
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(max(deadline - time.monotonic(), 0.0))
    return {worker.rank: f"was stopped at\n{worker.stack() or '(no stack: it did not react)'}" for worker in workers}


def _end(workers: list[_Worker], owner: int, patience: float = 0.0) -> None:
    """Stop processes, those first that do not leave by themselves when their connection closes."""
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


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
