"""A table's measurements as bars of text and as panels of a plot."""

from __future__ import annotations

from collections.abc import Iterable

from fusion_core.cli.plotting import Bar, Line, Panel, bars
from fusion_core.dispatch.bound_pattern import BARE
from fusion_core.tables.schema import UNFUSED
from fusion_core.tables.table import Row, Table
from fusion_core.tune.crossovers import fastest, series


def drawing(rows: Iterable[Row], *, ascii_only: bool) -> str:
    """A bar for each token count: the speed-up of the fastest path over the unfused one."""
    lines = []
    for row in rows:
        path = fastest(row.us)
        gain = row.us[UNFUSED] / row.us[path]
        times = "x" if ascii_only else "×"
        lines.append(Bar(str(row.tokens), gain, gain, gain, f"{gain:.2f}{times} {row.us[path]:.1f} us {path}"))
    return bars(lines, 1.0, ascii_only=ascii_only, width=40)


def panels(table: Table) -> list[Panel]:
    """The speed-up of every path over the unfused one by tokens, a panel per pattern, dtype and hidden size."""
    found = []
    every = series(table)
    # the same lines in each panel, so that a path has the same colour in all of them
    labels = dict.fromkeys(
        _short(name, pattern)
        for (pattern, _, _), rows in every.items()
        for row in rows
        for name in row.us
        if name != UNFUSED
    )
    for (pattern, dtype, hidden), rows in every.items():
        points: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
        for row in rows:
            for name, us in row.us.items():
                if name != UNFUSED:
                    points[_short(name, pattern)].append((row.tokens, row.us[UNFUSED] / us))
        lines = [Line(label, of) for label, of in points.items()]
        title = f"{pattern}\n{dtype}, hidden {hidden}"
        found.append(Panel(title, "tokens", "times as fast as unfused", lines, base=1.0))
    return found


def _short(name: str, pattern: str) -> str:
    """A strategy's name without its pattern's, so that one label serves in all panels."""
    backend, _, rest = name.partition(".")
    if pattern == BARE or not f"{rest}_".startswith(f"{pattern}_"):
        return name
    return " ".join(filter(None, (backend, "fused", rest[len(pattern) :].strip("_"))))
