"""The output of commands: JSON or text on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fusion_core.errors import ConfigError

WIDTH = 160
"""Columns of a table that is not printed to a terminal."""
TRIAL = 4096
"""Bytes of the trial file that is written before a long measurement."""


def check_can_write(option: str, path: Path) -> None:
    """Raise `ConfigError` if a file could not be written; for use before a long measurement."""
    found = f"{option} is {str(path)!r}"
    needs = "needs a file in a folder that exists and can be written"
    if path.is_dir():
        raise ConfigError(f"{found}, a folder, {needs}")
    try:
        try_to_write(path.resolve().parent)
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise ConfigError(f"{found} ({getattr(error, 'strerror', None) or error}), {needs}") from error


def try_to_write(folder: Path) -> None:
    """Raise OSError if no file can be written in a folder.

    It writes and removes a real file: permissions do not show that a file system is full or read-only.
    """
    with tempfile.TemporaryFile(dir=folder) as trial:
        trial.write(bytes(TRIAL))
        trial.flush()


_kept: list[tuple[TextIO, int]] = []
"""Stdout before each `stdout_to_stderr`: the stream, and a duplicate of its file descriptor."""


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirect to stderr whatever plugins, kernel libraries and the user's code print: stdout is for the answer.

    This includes output of native code and of child processes.
    """
    sys.stdout.flush()
    number = os.dup(1)
    _kept.append((sys.stdout, number))
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _kept.pop()
        os.dup2(number, 1)
        os.close(number)


def print_json(value: Any) -> None:
    """Print plain JSON types on stdout, even inside `stdout_to_stderr`."""
    text = json.dumps(value, indent=2)
    if not _kept:
        typer.echo(text)
        return
    stream, number = _kept[0]
    now = os.dup(1)
    os.dup2(number, 1)
    try:
        with redirect_stdout(stream):
            typer.echo(text)
            stream.flush()
    finally:
        os.dup2(now, 1)
        os.close(now)


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table without borders; the columns in ``right`` are right-aligned."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left")
    return made


def show(content: Table) -> None:
    """Print a table on stdout."""
    console = Console(markup=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = WIDTH
    with console.capture() as captured:
        console.print(content)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


class Stages:
    """Shows long stages on stderr if that is a terminal, and records how many seconds each took."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[None]:
        """One stage; ``name`` is its key in ``seconds``, ``text`` is shown."""
        task = self._progress.add_task(text, total=1)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)
        self._progress.update(task, completed=1)
