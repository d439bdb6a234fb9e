"""The handle of one worker process: a fresh interpreter, or a fork of one that has made its imports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any

from fusion_core.workers.nursery import NURSERIES, Forked, nursery

GRACE = 1.0
"""Seconds that the other ranks get to answer or exit after one has failed."""
_BOOTSTRAP = """
import json, sys
setup = json.loads(sys.argv[1])
sys.path[:] = setup.pop("path")
from fusion_core.workers.process import serve
serve(**setup)
"""


@dataclass(eq=False)
class Worker:
    """The parent's handle of one process.

    Attributes:
        rank: Its rank.
        process: The process. It leads its own session, so that its children can be stopped with it.
        connection: Carries calls and answers.
        lifeline: Carries no data. It closes when this process ends, however it ends, and the worker then exits.
        dump: The file to which faulthandler writes stacks.
    """

    rank: int
    process: subprocess.Popen[bytes] | Forked
    connection: Connection
    lifeline: socket.socket
    dump: IO[bytes]

    @classmethod
    def launch(cls, rank: int, world_size: int, backend: str, port: int, preload: Sequence[str] = ()) -> Worker:
        """Start the process.

        Args:
            rank: Its rank.
            world_size: The number of ranks.
            backend: The process group's backend.
            port: Of the store at which the ranks meet.
            preload: Modules that a process to fork has imported; empty for a fresh interpreter.
        """
        ours, theirs = socket.socketpair()
        lifeline, its_lifeline = socket.socketpair()
        dump = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the worker
        handles = [theirs.fileno(), its_lifeline.fileno(), dump.fileno()]
        setup = {"rank": rank, "world_size": world_size, "backend": backend, "port": port}
        sys.stdout.flush()
        process: subprocess.Popen[bytes] | Forked | None = None
        if preload and backend == "gloo":
            process = _fork(setup, handles, preload)
        if process is None:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, json.dumps({"path": import_path(), **setup, "handles": handles})],
                stdin=subprocess.DEVNULL,
                env=environment_of_workers(),
                pass_fds=handles,
                start_new_session=True,
            )
        theirs.close()
        its_lifeline.close()
        return cls(rank, process, Connection(ours.detach()), lifeline, dump)

    def is_gone(self) -> bool:
        """Whether the process has ended without an answer."""
        return self.process.poll() is not None and not self.connection.poll()

    def last_words(self) -> str:
        """How the process ended, and its stack if it left one."""
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        return f"{how}\n{self.stack()}".rstrip()

    def stack(self) -> str:
        """The stacks that faulthandler has written."""
        self.dump.seek(0)
        return str(self.dump.read().decode(errors="replace"))

    def signal(self, number: int) -> None:
        """Send a signal to the process and its children."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def _fork(setup: dict[str, Any], handles: list[int], preload: Sequence[str]) -> Forked | None:
    """A worker from a nursery; None if it needs an interpreter of its own."""
    path, environment = import_path(), environment_of_workers()
    needed = range(min(setup["world_size"], NURSERIES))  # which import side by side
    found = [nursery(number, preload, path, environment) for number in needed][setup["rank"] % NURSERIES]
    try:
        return None if found is None else found.fork(setup, path, environment, handles)
    except (EOFError, OSError):  # a module that cannot be imported: the worker will say so where it needs it
        return None


def import_path() -> list[str]:
    """This process's ``sys.path`` for a worker, with the working directory by its name."""
    return [*(entry or os.getcwd() for entry in sys.path), *([] if os.getcwd() in sys.path else [os.getcwd()])]


def environment_of_workers() -> dict[str, str]:
    """A worker's environment."""
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    return environment


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
