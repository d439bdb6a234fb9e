"""Which path is the fastest where, of a table: as ranges of token counts, as text and as panels of a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fusion_core.dispatch.path import BARE
from fusion_core.plotting import Bar, Line, Panel, bars
from fusion_core.tables.schema import UNFUSED
from fusion_core.tables.table import Row, Table

Series = tuple[str, str, int]
"""A pattern, a dtype and a hidden size."""


@dataclass(frozen=True, slots=True)
class Range:
    """Neighbouring measured token counts at which one path is the fastest.

    Attributes:
        pattern: The pattern.
        dtype: Of x.
        hidden: The hidden size.
        first: The least of the token counts.
        last: The most.
        path: `UNFUSED`, or the strategy's name.
        us: Its microseconds at the two.
        unfused: Those of the unfused path.
    """

    pattern: str
    dtype: str
    hidden: int
    first: int
    last: int
    path: str
    us: tuple[float, float]
    unfused: tuple[float, float]

    @property
    def gains(self) -> tuple[float, float]:
        """How many times as fast as the unfused path it is at the two."""
        return self.unfused[0] / self.us[0], self.unfused[1] / self.us[1]

    def to_dict(self) -> dict[str, Any]:
        """The range as plain JSON types."""
        return {
            "pattern": self.pattern,
            "dtype": self.dtype,
            "hidden": self.hidden,
            "first": self.first,
            "last": self.last,
            "path": self.path,
            "us": list(self.us),
            "unfused_us": list(self.unfused),
            "gains": [round(gain, 3) for gain in self.gains],
        }


def series(table: Table) -> dict[Series, list[Row]]:
    """The rows of each pattern, dtype and hidden size in rising order of tokens; in the table's order otherwise."""
    found: dict[Series, list[Row]] = {}
    for row in table.rows:
        found.setdefault((row.pattern, row.dtype, row.hidden), []).append(row)
    return {key: sorted(rows, key=lambda row: row.tokens) for key, rows in found.items()}


def fastest(us: Mapping[str, float]) -> str:
    """The path that takes least; of several that take the same the unfused one, then by name."""
    return min(us, key=lambda name: (us[name], name != UNFUSED, name))


def crossovers(table: Table) -> tuple[Range, ...]:
    """Where one path takes over from another as tokens grow, at the measured points.

    Example:
        >>> from fusion_core.tables import Machine
        >>> us = [{"unfused": 16.0, "acme.sum": 4.0}, {"unfused": 20.0, "acme.sum": 10.0}, {"unfused": 30.0}]
        >>> rows = tuple(Row("all_reduce", "bfloat16", 4096, *point) for point in zip((1, 8, 64), us))
        >>> for each in crossovers(Table(Machine("Acme 9000"), rows, "2026-11-22T10:00:00+00:00", "")):
        ...     print(each.first, each.last, each.path, each.gains)
        1 8 acme.sum (4.0, 2.0)
        64 64 unfused (1.0, 1.0)
    """
    found: list[Range] = []
    for (pattern, dtype, hidden), rows in series(table).items():
        start = 0
        for place, row in enumerate(rows):
            path = fastest(row.us)
            if place + 1 < len(rows) and fastest(rows[place + 1].us) == path:
                continue
            ends = rows[start], row
            us, unfused = ([each.us[name] for each in ends] for name in (path, UNFUSED))
            found.append(
                Range(
                    pattern, dtype, hidden, ends[0].tokens, row.tokens, path, (us[0], us[1]), (unfused[0], unfused[1])
                )
            )
            start = place + 1
    return tuple(found)


def drawing(rows: Iterable[Row], *, ascii_only: bool) -> str:
    """A bar for each token count: how many times as fast as the unfused path the fastest one is."""
    lines = []
    for row in rows:
        path = fastest(row.us)
        gain = row.us[UNFUSED] / row.us[path]
        times = "x" if ascii_only else "×"
        lines.append(Bar(str(row.tokens), gain, gain, gain, f"{gain:.2f}{times} {row.us[path]:.1f} us {path}"))
    return bars(lines, 1.0, ascii_only=ascii_only, width=40)


def panels(table: Table) -> list[Panel]:
    """All paths of each pattern and hidden size over tokens, as times as fast as the unfused path."""
    found = []
    every = series(table)
    # the same lines in each panel, so that one path has one colour
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
    """A strategy's name without the pattern that it is for: one line for each way over all panels."""
    backend, _, rest = name.partition(".")
    if pattern == BARE or not f"{rest}_".startswith(f"{pattern}_"):
        return name
    return " ".join(filter(None, (backend, "fused", rest[len(pattern) :].strip("_"))))
