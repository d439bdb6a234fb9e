"""What commands print: JSON or text on stdout, progress on stderr."""

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
"""Of tables that do not go to a terminal."""
TRIAL = 4096
"""Bytes that are written before a long measurement, to see that they can be."""


def check_can_write(option: str, path: Path) -> None:
    """Raise `ConfigError` where a file could not be written: to be asked before what takes long."""
    found = f"{option} is {str(path)!r}"
    needs = "needs a file in a folder that exists and can be written"
    if path.is_dir():
        raise ConfigError(f"{found}, a folder, {needs}")
    try:
        try_to_write(path.resolve().parent)
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise ConfigError(f"{found} ({getattr(error, 'strerror', None) or error}), {needs}") from error


def try_to_write(folder: Path) -> None:
    """Raise OSError where no file can be made and filled in a folder.

    A real one is, and removed: permissions alone say nothing of a file system that is full or read-only.
    """
    with tempfile.TemporaryFile(dir=folder) as trial:
        trial.write(bytes(TRIAL))
        trial.flush()


_kept: list[tuple[TextIO, int]] = []
"""Stdout as it was before each `stdout_to_stderr`: the stream, and a copy of its file's number."""


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Stdout belongs to the answer: what plugins, kernel libraries and the user's code say meanwhile goes to stderr.

    Whether they are Python or not, in this process or in one that it starts.
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
    """Print plain JSON types on stdout, inside of `stdout_to_stderr` too."""
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
    """An empty table without lines; the columns named by ``right`` are aligned to the right."""
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
    """Shows on stderr what takes long, where that is a terminal; keeps the seconds that each took."""

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
        """One stage; ``name`` is its key in ``seconds``, ``text`` what is shown."""
        task = self._progress.add_task(text, total=1)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)
        self._progress.update(task, completed=1)
