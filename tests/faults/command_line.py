"""The command ``fusion-core`` with wrong calls, files and environments, and with interruptions while it runs.

A row has arguments of the command, or a shell line in which ``$FUSION_CORE`` is the command. A traceback is allowed
only if the user's own code raised, and it must not show a line of fusion_core.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from tests.faults.command_line_rows import CALLS, CODE, ENVIRONMENTS, PLACES, PROCESSES

ROWS = (*CALLS, *CODE, *PLACES, *ENVIRONMENTS, *PROCESSES)

FIXTURES = ("tmp_path", "monkeypatch")
LIMIT = 240.0
"""Seconds that a process may take: starting one is slow on a busy machine."""
COMMAND = f"{sys.executable} -m fusion_core"


def observe(
    *,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: Sequence[str] = (),
    shell: str | None = None,
    ranks: Sequence[Mapping[str, str]] = (),
    interrupted: bool = False,
    environment: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> str:
    """Run the command; returns its status and the last line on stderr.

    Args:
        tmp_path: The working directory; ``{tmp}`` in arguments and values.
        monkeypatch: Sets the environment.
        args: Its arguments. Without any of the next three it runs in this process.
        shell: A shell line that runs it instead.
        ranks: The environment of each process, if several run it together.
        interrupted: Whether it gets a SIGINT after it has started workers.
        environment: Environment variables.
        files: Name → content of files in the working directory.
    """
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    monkeypatch.chdir(tmp_path)
    for name, value in (environment or {}).items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    words = [word.format(tmp=tmp_path) for word in args]
    if shell is not None:
        return _of_a_shell(shell)
    if ranks:
        return _of_ranks(words, ranks)
    if interrupted:
        return _interrupted(words)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    from fusion_core.cli.app import app

    done = typer.testing.CliRunner().invoke(app, words)
    if not isinstance(done.exception, SystemExit | None):
        return f"crash: {done.exception!r}"
    return _verdict(done.exit_code, done.stdout, done.stderr)


def _verdict(status: int, stdout: str, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    if "Traceback" in stderr and ("fusion_core/" in stderr or status != 1):
        return f"crash: {stderr}"
    if status and stdout:
        return f"half an answer: {stdout[:200]}"
    own = "the user's own traceback: " if "Traceback" in stderr else ""
    if status and not own and len(lines) > 1:
        return f"more than a sentence: {stderr}"
    return f"exit {status}: {own}{lines[-1] if lines else ''}"


def _of_a_shell(line: str) -> str:
    done = subprocess.run(
        ["bash", "-c", line],
        env={**os.environ, "FUSION_CORE": COMMAND},
        capture_output=True,
        timeout=LIMIT,
        check=False,
    )
    return _verdict(done.returncode, "", done.stderr.decode(errors="replace"))


def _of_ranks(words: Sequence[str], ranks: Sequence[Mapping[str, str]]) -> str:
    """The verdict of all ranks, if it is the same."""
    shared = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = [
        subprocess.Popen(
            [*COMMAND.split(), *words],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", **shared, "RANK": str(rank), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(ranks)
    ]
    verdicts = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=LIMIT)
            verdicts.append(_verdict(process.returncode, stdout, stderr))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return verdicts[0] if len({*verdicts}) == 1 else f"ranks differ: {verdicts}"


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _interrupted(words: Sequence[str]) -> str:
    """Send SIGINT to only the command when it has workers, and check that they end with it."""
    with subprocess.Popen(
        [*COMMAND.split(), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            workers = _wait_for_children(process)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    left = [worker for worker in workers if _runs(worker)]
    if left:
        return f"orphans: {left}"
    return f"{_verdict(process.returncode, stdout, stderr)}{len(workers)} workers ended"


def _wait_for_children(process: Any) -> list[int]:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if len(children) >= 2:
            return [int(child) for child in children]
        time.sleep(0.05)
    raise AssertionError(f"no workers: {process.communicate()}")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
