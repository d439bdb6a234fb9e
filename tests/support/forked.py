"""All workers of the suite are forks of processes that have imported torch and Inductor and compiled once.

The suite starts some 150 workers, each of which would spend six seconds of CPU on imports. A forked worker does the
same as a fresh one, with two differences: its interpreter existed before it, and its gloo groups share one thread
(`tests.support.one_loop`). ``tests/test_workers.py`` starts fresh interpreters, and ``make test-nightly`` runs every
test with what its pool asks for.

Under xdist the process that starts pytest has two seedbeds, which make the imports once. Each of xdist's workers gets a
nursery forked from each of them, instead of nurseries that import for themselves.
"""

from __future__ import annotations

import importlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fusion_core.workers import nursery
from fusion_core.workers.worker import Worker, environment_of_workers, import_path

ROOT = Path(__file__).parents[2]
PRELOAD = ("tests.support.preloaded",)
ADDRESSES = "TESTS_SEEDBEDS"
"""The variable that tells xdist's workers in which folder the seedbeds listen."""
_SEEDBED = "import sys; sys.path[:] = {path!r}; from tests.support.forked import grow; grow({handle})"


def launch(rank: int, world_size: int, backend: str, port: int, preload: Sequence[str] = ()) -> Worker:
    """`Worker.launch` by a fork. CUDA does not work after one."""
    return as_asked(rank, world_size, backend, port, preload if torch.cuda.is_available() else PRELOAD)


as_asked = Worker.launch


def start_seedbeds() -> None:
    """Start the seedbeds. They end with this process, whose end closes their input."""
    folder = Path(tempfile.mkdtemp(prefix="seedbeds"))
    os.environ[ADDRESSES] = str(folder)
    for number in range(nursery.NURSERIES):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / str(number)))
            listening.listen()
            command = [sys.executable, "-c", _SEEDBED.format(path=import_path(), handle=listening.fileno())]
            handles = [listening.fileno()]
            _seedbeds.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, env=environment_of_workers(), pass_fds=handles, cwd=ROOT
                )
            )


def stop_seedbeds() -> None:
    """Stop them, where they were started."""
    for each in _seedbeds:
        assert each.stdin is not None
        each.stdin.close()
        each.kill()
        each.wait()
    if _seedbeds:
        shutil.rmtree(os.environ.pop(ADDRESSES))
    _seedbeds.clear()


def connect() -> None:
    """Have this process's nurseries forked from the seedbeds, if there are any."""
    for number in range(nursery.NURSERIES) if ADDRESSES in os.environ else ():
        requests = socket.socket(socket.AF_UNIX)
        requests.connect(str(Path(os.environ[ADDRESSES]) / str(number)))
        nursery.known[number, PRELOAD] = nursery.Nursery(requests, environment_of_workers())
    os.environ.pop(ADDRESSES, None)  # a program that a test starts has no part in this


def grow(handle: int) -> None:
    """Run a seedbed: import, then fork a nursery for each connection until the input closes."""
    for name in PRELOAD:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no zombie stays
    listening = socket.socket(fileno=handle)
    while True:
        ready, _, _ = select.select([0, listening], [], [])
        if 0 in ready:
            os._exit(0)
        requests, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            nursery.tend(requests.detach(), ())
        requests.close()


_seedbeds: list[subprocess.Popen[bytes]] = []
