"""A process that has made the imports of a pool's workers, and forks them: an import of torch takes seconds of CPU.

A forked worker does what a fresh interpreter does. Ranks get nurseries with different hash seeds in turn, so that an
order that depends on them differs between ranks, as it does for a user.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

NURSERIES = 2
AT_IMPORT = ("TORCH", "OMP", "MKL", "KMP", "LD_", "PYTHON", "CUDA", "KINETO", "FUSION_CORE_")
"""Prefixes of variables that may be read at import: a worker whose own differ gets a fresh interpreter."""
READ_LATER = {"TORCHINDUCTOR_CACHE_DIR"}
_MAIN = "import sys; sys.path[:] = {path!r}; from fusion_core.workers.nursery import tend; tend({handle}, {preload!r})"
_STATUS = struct.Struct("q")


@dataclass
class Forked:
    """A forked worker, with the part of `subprocess.Popen` that a pool needs."""

    pid: int
    status: int
    returncode: int | None = field(default=None)

    def poll(self) -> int | None:
        """The exit code, as `subprocess` gives it; None while the process runs."""
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process.

        Raises:
            subprocess.TimeoutExpired: if it does not end in time.
        """
        if (code := self._await(timeout)) is None:
            raise subprocess.TimeoutExpired("a forked worker", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None and wait([self.status], timeout):
            told = os.read(self.status, _STATUS.size)
            os.close(self.status)
            # the nursery itself has ended: this worker with it, as its lifeline is this process's
            self.returncode = _STATUS.unpack(told)[0] if told else -signal.SIGKILL
        return self.returncode


class Nursery:
    """This process's handle of one nursery.

    Args:
        requests: The connection to it.
        environment: The environment with which it made its imports.
        process: It, if this process has started it.
    """

    def __init__(
        self, requests: socket.socket, environment: dict[str, str], process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self._socket, self._environment, self._process = requests, environment, process
        self._lock, self._owner = threading.Lock(), os.getpid()
        atexit.register(self._close)

    @classmethod
    def start(cls, preload: Sequence[str], path: list[str], environment: dict[str, str]) -> Nursery:
        """Start one.

        Args:
            preload: Modules that it imports. They may start no thread.
            path: Its ``sys.path``.
            environment: Its environment.
        """
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN.format(path=path, handle=theirs.fileno(), preload=tuple(preload))],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        return cls(ours, environment, process)

    @property
    def usable(self) -> bool:
        """Whether this process can ask it; a fork of this process cannot."""
        return self._owner == os.getpid() and (self._process is None or self._process.poll() is None)

    def takes(self, environment: dict[str, str]) -> bool:
        """Whether a worker with this environment can be forked here."""
        ours = self._environment
        differing = {name for name in ours.keys() | environment.keys() if ours.get(name) != environment.get(name)}
        at_import = any(name.startswith(AT_IMPORT) for name in differing - READ_LATER)
        return not at_import

    def fork(self, setup: dict[str, Any], path: list[str], environment: dict[str, str], handles: list[int]) -> Forked:
        """Fork a worker.

        Args:
            setup: The arguments of `fusion_core.workers.process.serve`, without ``handles``.
            path: Its ``sys.path``.
            environment: Its environment.
            handles: The files for ``serve``. It writes to this process's standard output and error.

        Raises:
            EOFError: if the nursery has ended, by an import that fails. Or an OSError.
        """
        status, its_status = os.pipe()
        try:
            with self._lock, Connection(os.dup(self._socket.fileno())) as connection:
                socket.send_fds(self._socket, [b"+"], [its_status, 1, 2, *handles])
                connection.send((setup, path, environment, os.getcwd()))
                forked = Forked(connection.recv(), status)
        except BaseException:
            os.close(status)
            raise
        finally:
            os.close(its_status)
        with suppress(ProcessLookupError):
            while forked.poll() is None and os.getsid(forked.pid) != forked.pid:  # its group can then be stopped
                time.sleep(0.001)
        return forked

    def _close(self) -> None:
        if self._owner == os.getpid():
            self._socket.close()
            if self._process is not None:
                self._process.kill()
                self._process.wait()


known: dict[tuple[int, tuple[str, ...]], Nursery] = {}
"""Number and modules → the nursery."""
_starting = threading.Lock()


def nursery(number: int, preload: Sequence[str], path: list[str], environment: dict[str, str]) -> Nursery | None:
    """A nursery by its number; None if a worker with this environment needs an interpreter of its own."""
    with _starting:
        key = (number, tuple(preload))
        found = known.get(key)
        if found is None or not found.usable:
            found = known[key] = Nursery.start(preload, path, environment)
        return found if found.takes(environment) else None


def tend(handle: int, preload: Sequence[str]) -> None:
    """Run a nursery: import, then fork a worker for each request until the other end closes."""
    import importlib
    import select

    for name in preload:
        importlib.import_module(name)
    requests = socket.socket(fileno=handle)
    connection = Connection(os.dup(handle))
    os.set_inheritable(handle, False)
    wakeup, its_wakeup = os.pipe()
    for each in (wakeup, its_wakeup):
        os.set_blocking(each, False)
    signal.set_wakeup_fd(its_wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # whose only work is to wake the loop
    children: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([handle, wakeup], [], [])
        if wakeup in ready:
            with suppress(BlockingIOError):
                os.read(wakeup, 4096)
            _reap(children)
        if handle not in ready:
            continue
        told, files, _, _ = socket.recv_fds(requests, 1, 16)
        if not told:
            os._exit(0)
        setup, path, environment, directory = connection.recv()
        status, stdout, stderr, *handles = files
        if (pid := os.fork()) == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (handle, connection.fileno(), wakeup, its_wakeup, status, *children.values()):
                os.close(each)
            _become_a_worker(setup, path, environment, directory, stdout, stderr, handles)
        children[pid] = status
        for each in (stdout, stderr, *handles):
            os.close(each)
        connection.send(pid)


def _reap(children: dict[int, int]) -> None:
    """Tell how each child ended that has."""
    for pid, status in list(children.items()):
        found, code = os.waitpid(pid, os.WNOHANG)
        if found:
            with suppress(BrokenPipeError):
                os.write(status, _STATUS.pack(os.waitstatus_to_exitcode(code)))
            os.close(status)
            del children[pid]


def _become_a_worker(
    setup: dict[str, Any],
    path: list[str],
    environment: dict[str, str],
    directory: str,
    stdout: int,
    stderr: int,
    handles: list[int],
) -> None:
    """In the fork: put in place what differs from the nursery, and serve. Does not return."""
    try:
        os.setsid()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.path[:] = path
        from fusion_core.workers.process import serve

        serve(**setup, handles=handles)
    finally:
        os._exit(1)
