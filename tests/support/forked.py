"""Workers that are forked from a process that has imported torch and Inductor already, instead of fresh interpreters.

Of some 150 workers of the suite each would import for six seconds of CPU. What a worker does is the same; what is not:
its interpreter was not started for it, and its gloo groups share a thread (`tests.support.one_loop`). So the two servers have hash seeds of their own, as the ranks of a user have,
``tests/test_workers.py`` tests fresh interpreters, and ``make test-nightly`` runs every test with them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fusion_core.workers.pool import _environment, _path, _Worker

ROOT = Path(__file__).parents[2]
SERVERS = 2
AT_IMPORT = ("TORCH", "OMP", "MKL", "KMP", "LD_", "PYTHON", "CUDA", "KINETO", "FUSION_CORE_")
"""Beginnings of variables that may be read at import: a worker with others of them gets a fresh interpreter."""
READ_LATER = {"TORCHINDUCTOR_CACHE_DIR"}


@functools.cache
def _server(number: int) -> tuple[forkserver.ForkServer, dict[str, str]]:
    """A server that has imported what workers import, and the environment that it started with."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["tests.support.preloaded"])
    before = dict(os.environ)
    environment = _environment()
    try:
        os.environ.update(environment)
        with contextlib.chdir(ROOT):  # from where `tests` can be imported
            server.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server, environment


@dataclass
class _Start:
    """What the server's child does, by the name that `multiprocessing.spawn` calls."""

    setup: dict[str, Any]
    environment: dict[str, str]
    directory: str

    def _bootstrap(self, parent_sentinel: int) -> int:
        from fusion_core.workers.process import serve
        from tests.support import one_loop

        one_loop.use()
        os.setsid()
        os.close(parent_sentinel)
        *handles, stdout, stderr = forkserver._forkserver.get_inherited_fds()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.directory)
        serve(**self.setup, handles=handles)
        return 1


@dataclass
class Forked:
    """A forked worker, with as much of `subprocess.Popen` as a pool needs."""

    pid: int
    status: int
    returncode: int | None = field(default=None)

    @classmethod
    def start(cls, server: forkserver.ForkServer, start: _Start, handles: list[int]) -> Forked:
        status, data = server.connect_to_new_process(handles)
        with open(data, "wb") as file:
            pickle.dump({"sys_path": _path()}, file)
            pickle.dump(start, file)
        forked = cls(forkserver.read_signed(status), status)
        with contextlib.suppress(ProcessLookupError):
            while forked.poll() is None and os.getsid(forked.pid) != forked.pid:  # its group can then be stopped
                time.sleep(0.001)
        return forked

    def poll(self) -> int | None:
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._await(timeout)) is None:
            raise subprocess.TimeoutExpired("a forked worker", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None and wait([self.status], timeout):
            self.returncode = forkserver.read_signed(self.status)
            os.close(self.status)
        return self.returncode


def launch(rank: int, world_size: int, backend: str, port: int) -> _Worker:
    """`_Worker.launch`, by a fork where that is the same. CUDA cannot be used in a process that was forked."""
    if backend != "gloo" or torch.cuda.is_available():
        return _fresh(rank, world_size, backend, port)
    server, before = _server(rank % SERVERS)
    environment = _environment()
    differing = {name for name in before.keys() | environment.keys() if before.get(name) != environment.get(name)}
    if any(name.startswith(AT_IMPORT) for name in differing - READ_LATER):
        return _fresh(rank, world_size, backend, port)
    ours, theirs = socket.socketpair()
    lifeline, its_lifeline = socket.socketpair()
    dump = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
    setup = {"rank": rank, "world_size": world_size, "backend": backend, "port": port}
    sys.stdout.flush()
    handles = [theirs.fileno(), its_lifeline.fileno(), dump.fileno(), 1, 2]
    process = Forked.start(server, _Start(setup, environment, os.getcwd()), handles)
    theirs.close()
    its_lifeline.close()
    return _Worker(rank, process, Connection(ours.detach()), lifeline, dump)  # type: ignore[arg-type]


_fresh = _Worker.launch
