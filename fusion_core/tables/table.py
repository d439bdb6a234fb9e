"""A tuning table: measured times of every way to run a site, interpolated between the measured points."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fusion_core.tables import schema
from fusion_core.tables.machine import Machine
from fusion_core.tables.schema import UNFUSED, TableError, is_base_line

__all__ = ["UNFUSED", "Row", "Table", "TableError"]

TWINS = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
"""Dtypes of the same size, whose kernels take the same time: each one's times are used for the other if it has none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured point.

    Attributes:
        pattern: The longest pattern that matches at the site.
        dtype: Dtype of x, without ``torch.``: ``"bfloat16"``.
        hidden: The size of x's last dimension.
        tokens: The product of its other dimensions.
        us: `UNFUSED` and names of strategies → microseconds per site. A strategy that did not run there is absent. The
            unfused path over another all_reduce than torch's has a column of its own (`schema.base_line`).
    """

    pattern: str
    dtype: str
    hidden: int
    tokens: int
    us: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """What was measured on one machine.

    Attributes:
        machine: The machine.
        rows: The points, in any order. For a pattern and dtype every hidden size has the same token counts.
        made: When it was made, as an ISO time in UTC.
        command: The command that made it.

    Raises:
        TableError: `fusion_core.tables.schema.check` refuses the rows or other fields.

    Example:
        >>> us = [{"unfused": 16.0, "acme.sum": 4.0}, {"unfused": 16.0, "acme.sum": 64.0}]
        >>> rows = tuple(Row("all_reduce", "bfloat16", 4096, *point) for point in zip((1, 16), us))
        >>> table = Table(Machine("Acme 9000", world_size=2), rows, "2026-11-22T10:00:00+00:00", "a measurement")
        >>> for name, us in table.times("all_reduce", torch.float16, 4096, 4).items():
        ...     print(f"{name} {us:.1f}")
        unfused 16.0
        acme.sum 16.0
        >>> table.times("all_reduce", torch.float16, 4096, 32)
        {}
    """

    machine: Machine
    rows: tuple[Row, ...]
    made: str
    command: str

    def __post_init__(self) -> None:
        schema.check(self.to_dict())

    def times(self, pattern: str, dtype: torch.dtype, hidden: int, tokens: int) -> dict[str, float]:
        """Microseconds per site of each way to run it: as measured, or interpolated between the neighbouring points.

        Between points the logarithm of the time is linear in that of the tokens and in that of the hidden size. A
        strategy has a time if it ran at all the points that are needed. The result is empty beyond the outermost
        points, and for a pattern or dtype that was not measured.
        """
        grid = self._grids.get((pattern, dtype))
        return {} if grid is None else grid.times(hidden, tokens)

    @cached_property
    def _grids(self) -> Mapping[tuple[str, torch.dtype], _Grid]:
        series: dict[tuple[str, torch.dtype], list[Row]] = {}
        for row in self.rows:
            series.setdefault((row.pattern, getattr(torch, row.dtype)), []).append(row)
        grids = {key: _Grid(rows) for key, rows in series.items()}
        for (pattern, dtype), grid in list(grids.items()):
            if dtype in TWINS:
                grids.setdefault((pattern, TWINS[dtype]), grid)
        return grids

    @cached_property
    def backends(self) -> frozenset[str]:
        """The names of backends with a measured strategy."""
        return frozenset(name.partition(".")[0] for row in self.rows for name in row.us if not is_base_line(name))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what affects choices: the rows, in any order, but not when or how they were measured."""
        rows = sorted(json.dumps({**_plain(row), "us": _floats(row.us)}, sort_keys=True) for row in self.rows)
        return hashlib.sha256(json.dumps([schema.SCHEMA, rows]).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON types."""
        return {
            "schema": schema.SCHEMA,
            "machine": self.machine.to_dict(),
            "made": self.made,
            "command": self.command,
            "rows": [_plain(row) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Table:
        """The table from `to_dict`'s result.

        Raises:
            TableError: ``data`` is not such a result. Gives the path, what is there, and what it needs.
        """
        schema.check(data)
        machine = {**data["machine"], "versions": dict(data["machine"]["versions"])}
        rows = tuple(Row(**{**row, "us": dict(row["us"])}) for row in data["rows"])
        return cls(Machine(**machine), rows, data["made"], data["command"])


def _plain(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in schema.ROW[:-1]} | {"us": dict(row.us)}


def _floats(us: Mapping[str, float]) -> dict[str, float]:
    return {name: float(time) for name, time in us.items()}  # a file may contain 10 for 10.0


class _Axis:
    """The measured values of one size, in order."""

    def __init__(self, values: Iterable[int]) -> None:
        self.values = sorted(set(values))
        self._logs = [math.log(value) for value in self.values]

    def weights(self, value: int) -> tuple[tuple[int, float], ...]:
        """The indices and weights of the neighbours of ``value``: only itself if it was measured.

        Empty outside of the measured range.
        """
        after = bisect_left(self.values, value)
        if after < len(self.values) and self.values[after] == value:
            return ((after, 1.0),)
        if after in (0, len(self.values)):
            return ()
        low, high = self._logs[after - 1], self._logs[after]
        part = (math.log(value) - low) / (high - low)
        return (after - 1, 1.0 - part), (after, part)


class _Grid:
    """The points of one pattern and dtype. The table was checked: none is missing or duplicated."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._hidden = _Axis(row.hidden for row in rows)
        self._tokens = _Axis(row.tokens for row in rows)
        at = {(row.hidden, row.tokens): row.us for row in rows}
        self._us = [[_floats(at[hidden, tokens]) for tokens in self._tokens.values] for hidden in self._hidden.values]
        self._logs = [[{name: math.log(us) for name, us in cell.items()} for cell in line] for line in self._us]

    def times(self, hidden: int, tokens: int) -> dict[str, float]:
        lines, columns = self._hidden.weights(hidden), self._tokens.weights(tokens)
        corners = [(self._logs[i][j], along * across) for i, along in lines for j, across in columns]
        if not corners:
            return {}
        base = self._us[lines[0][0]][columns[0][0]]
        first, others = corners[0][0], corners[1:]
        times = {}
        for name, log in first.items():
            above = 0.0  # relative to the first corner: exact for a measured point, and between equal times
            for cell, part in others:
                if name not in cell:
                    break
                above += part * (cell[name] - log)
            else:
                times[name] = base[name] * math.exp(above)
        return times
