"""The fastest path at each token count of a table, as ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion_core.tables.schema import UNFUSED, is_base_line
from fusion_core.tables.table import Row, Table

Series = tuple[str, str, int]
"""A pattern, a dtype and a hidden size."""


@dataclass(frozen=True, slots=True)
class Range:
    """Neighbouring measured token counts at which one path is the fastest.

    Attributes:
        pattern: The pattern.
        dtype: The dtype of x.
        hidden: The hidden size.
        first: The lowest of the token counts.
        last: The highest.
        path: The base line's column, or the strategy's name.
        us: Its microseconds at ``first`` and ``last``.
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
        """Its speed-up over the unfused path at ``first`` and ``last``."""
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
    """The rows of each pattern, dtype and hidden size, sorted by tokens; the groups are in the table's order."""
    found: dict[Series, list[Row]] = {}
    for row in table.rows:
        found.setdefault((row.pattern, row.dtype, row.hidden), []).append(row)
    return {key: sorted(rows, key=lambda row: row.tokens) for key, rows in found.items()}


def fastest(us: Mapping[str, float], base: str = UNFUSED) -> str:
    """The path with the least time: a strategy or the base line; at a tie the base line, then the first by name."""
    paths = [name for name in us if name == base or not is_base_line(name)]
    return min(paths, key=lambda name: (us[name], name != base, name))


def base_lines(table: Table) -> tuple[str, ...]:
    """The columns of unfused paths that every row has, torch's first."""
    common = set.intersection(*({name for name in row.us if is_base_line(name)} for row in table.rows))
    return tuple(sorted(common))


def crossovers(table: Table, base: str = UNFUSED) -> tuple[Range, ...]:
    """The ranges of measured token counts between which the fastest path changes.

    Args:
        table: The table.
        base: The column of the unfused path to compare with; every row has it (`base_lines`).

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
            path = fastest(row.us, base)
            if place + 1 < len(rows) and fastest(rows[place + 1].us, base) == path:
                continue
            ends = rows[start], row
            us, unfused = ([each.us[name] for each in ends] for name in (path, base))
            found.append(
                Range(
                    pattern, dtype, hidden, ends[0].tokens, row.tokens, path, (us[0], us[1]), (unfused[0], unfused[1])
                )
            )
            start = place + 1
    return tuple(found)
