"""Writes and prints the table that ``fusion-core tune`` measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fusion_core._files import write_whole
from fusion_core.cli import plotting
from fusion_core.cli.output import check_can_write, print_json, show, try_to_write
from fusion_core.errors import ConfigError
from fusion_core.tables.schema import UNFUSED
from fusion_core.tables.store import CACHE_NEEDS, folder, save, to_json
from fusion_core.tables.table import Table

if TYPE_CHECKING:
    from fusion_core.tune.tuner import Tuned


def check_can_keep(output: Path | None, plot: Path | None) -> None:
    """Raise `ConfigError` if a file could not be written: before ten minutes of measurement, not after."""
    if plot is not None:
        plotting.check_can_save(plot)
        check_can_write("--plot", plot)
    if output is not None:
        check_can_write("--output", output)
        return
    there = folder()
    if not there.is_absolute():
        raise ConfigError(f"the table would be written to {there}, needs {CACHE_NEEDS}")
    while not there.exists():  # missing folders will be created
        there = there.parent
    try:
        try_to_write(there)
    except OSError as error:
        raise ConfigError(
            f"the table cannot be written to {folder()} ({error.strerror}), needs {CACHE_NEEDS}"
        ) from error


def finish(tuned: Tuned, output: Path | None, plot: Path | None, as_json: bool, seconds: float) -> None:
    """Write the table to its file, and print it.

    Raises:
        ConfigError: if it cannot be written; it is printed first.
    """
    path, unkept = None, None
    try:
        if tuned.table is not None:
            path = _keep(tuned.table, output, plot)
    except ConfigError as error:
        unkept = error
    if as_json:
        print_json(_plain(tuned, path, seconds))
    else:
        _show(tuned, path, seconds)
    if unkept is not None:
        raise unkept


def _keep(table: Table, output: Path | None, plot: Path | None) -> Path:
    from fusion_core.cli.tune_drawing import panels

    if output is None:
        path = save(table)
    else:
        path = output
        try:
            write_whole(output, to_json(table))
        except OSError as error:
            raise ConfigError(f"--output {output} cannot be written: {error}") from error
    if plot is not None:
        plotting.save(plot, f"{table.machine.world_size} × {table.machine.gpu}", panels(table))
    return path


def _plain(tuned: Tuned, path: Path | None, seconds: float) -> dict[str, Any]:
    from fusion_core.tune.crossovers import base_lines, crossovers

    return {
        "path": None if path is None else str(path),
        "seconds": round(seconds, 1),
        "table": None if tuned.table is None else tuned.table.to_dict(),
        "crossovers": [
            {"base_line": base} | each.to_dict()
            for table in filter(None, [tuned.table])
            for base in base_lines(table)
            for each in crossovers(table, base)
        ],
        "notes": [
            {"pattern": n.pattern, "hidden": n.hidden, "tokens": n.tokens, "path": n.path, "why": n.why}
            for n in tuned.notes
        ],
    }


def _show(tuned: Tuned, path: Path | None, seconds: float) -> None:
    from fusion_core.cli import tune_text as text
    from fusion_core.tune.crossovers import base_lines

    if tuned.table is not None:
        ranks, gpu = tuned.table.machine.world_size, tuned.table.machine.gpu
        typer.echo(f"the fastest path on {ranks} × {gpu}, microseconds a place at the first and last token count\n")
        for base in base_lines(tuned.table):
            if base != UNFUSED:
                typer.echo(f"\ncompared with {base}\n")
            show(text.grid(tuned.table, base))
        for drawn in text.drawings(tuned.table, ascii_only=not sys.stdout.isatty()):
            typer.echo(f"\n{drawn}")
        typer.echo("")
    for line in text.notes(tuned.notes):
        typer.echo(line)
    if tuned.table is None:
        typer.echo("nothing was measured: no table was written; fusion-core backends lists what can be used here")
    elif path is not None:
        typer.echo(f"\n{len(tuned.table.rows)} points in {seconds:.0f} s, written to {path}")
