"""The schema of a tuning table as plain JSON types, and the check of a document against it.

A table comes from a file that may have been edited by hand, and it decides what runs. So everything in it is checked,
and unknown content is an error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NoReturn

from fusion_core.errors import ConfigError

SCHEMA = 1
"""Version of the form; it changes if a reader of the old form would misread the new one."""

UNFUSED = "unfused"
"""The column of the best time that ``torch.compile`` reaches without fusion_core."""


def base_line(collective: str | None) -> str:
    """The column of the unfused path over another all_reduce than torch's, such as ``vllm::all_reduce``.

    Example:
        >>> base_line("vllm::all_reduce"), base_line(None)
        ('unfused vllm::all_reduce', 'unfused')
    """
    return UNFUSED if collective is None else f"{UNFUSED} {collective}"


def is_base_line(column: str) -> bool:
    """Whether a column has the times of an unfused path, not of a strategy."""
    return column == UNFUSED or column.startswith(f"{UNFUSED} ")


DTYPES = ("bfloat16", "float16", "float32", "float64")
TOP = ("schema", "machine", "made", "command", "rows")
MACHINE = ("gpu", "arch", "links", "world_size", "driver", "versions")
ROW = ("pattern", "dtype", "hidden", "tokens", "us")
LARGEST = 2**31 - 1
"""The largest world size, hidden size or number of tokens."""

LONGEST = 1000
"""The most characters of a text."""

LEAST_US, MOST_US = 1e-3, 1e9
"""A nanosecond and a quarter of an hour: every time of a kernel is in between."""


class TableError(ConfigError):
    """A tuning table that cannot be used."""


def check(data: Any) -> None:
    """Raise `TableError` if ``data`` is not a table as plain JSON types: with the path, what is there, what it needs.

    Example:
        >>> check({"schema": 2, "machine": {}, "made": "", "command": "", "rows": []})
        Traceback (most recent call last):
            ...
        fusion_core.tables.schema.TableError: schema is 2, needs 1; fusion-core tune writes a table in that form
    """
    if isinstance(data, Mapping) and data.get("schema", SCHEMA) != SCHEMA:  # first: another version has other keys
        _refuse("schema", data["schema"], f"{SCHEMA}; fusion-core tune writes a table in that form")
    top = _object(data, "the table", TOP)
    _whole(top["schema"], "schema")
    machine = _object(top["machine"], "machine", MACHINE)
    for name in ("gpu", "arch", "links", "driver"):
        _text(machine[name], f"machine.{name}", empty=name != "gpu")
    _whole(machine["world_size"], "machine.world_size")
    for name, version in _object(machine["versions"], "machine.versions").items():
        _text(version, f"machine.versions.{name}")
    _time(top["made"])
    _text(top["command"], "command", empty=True)
    if not isinstance(top["rows"], list):
        _refuse("rows", top["rows"], "a list")
    for index, row in enumerate(top["rows"]):
        _row(row, f"rows[{index}]")
    _grid(top["rows"])


def _row(data: Any, path: str) -> None:
    row = _object(data, path, ROW)
    _text(row["pattern"], f"{path}.pattern")
    if row["dtype"] not in DTYPES:
        _refuse(f"{path}.dtype", row["dtype"], f"one of {', '.join(DTYPES)}")
    for name in ("hidden", "tokens"):
        _whole(row[name], f"{path}.{name}")
    times = _object(row["us"], f"{path}.us")
    for name, time in times.items():
        backend, dot, rest = name.partition(".")
        if not is_base_line(name) and not (backend and dot and rest):
            needs = f"{UNFUSED!r}, '{UNFUSED} <operator>', or the name of a strategy, as '<backend>.<something>'"
            _refuse(f"{path}.us", name, needs, "has")
        number = isinstance(time, int | float) and not isinstance(time, bool)
        if not (number and LEAST_US <= time <= MOST_US):  # also false for NaN
            _refuse(f"{path}.us.{name}", time, f"microseconds, a number from {LEAST_US:g} to {MOST_US:g}")
    if UNFUSED not in times:
        _refuse(f"{path}.us", sorted(times), f"{UNFUSED!r} too, which all other times are compared with", "has")


def _grid(rows: Sequence[Mapping[str, Any]]) -> None:
    """Check that each point occurs once, and that a pattern and dtype has the same token counts at each hidden size."""
    tokens: dict[tuple[str, str], dict[int, set[int]]] = {}
    first: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        series = row["pattern"], row["dtype"]
        counts = tokens.setdefault(series, {}).setdefault(row["hidden"], set())
        if row["tokens"] in counts:
            point = f"{row['pattern']}, {row['dtype']}, hidden {row['hidden']}, tokens {row['tokens']}"
            raise TableError(f"rows[{index}] measures {_short(point)} a second time, needs each point once")
        counts.add(row["tokens"])
        first.setdefault(series, row["hidden"])
    for series, sizes in tokens.items():
        wanted = sizes[first[series]]
        for hidden, counts in sizes.items():
            if missing := sorted(wanted ^ counts):
                raise TableError(
                    f"rows of {_short(series[0])}, {series[1]} have tokens {_short(missing)} at only one of hidden "
                    f"{first[series]} and {hidden}, needs the same token counts at every hidden size"
                )


def _object(data: Any, path: str, keys: Sequence[str] | None = None) -> Mapping[str, Any]:
    """``data``, checked to be an object with exactly these keys, or with any text keys."""
    needs = "an object" if keys is None else f"an object with {', '.join(keys)}"
    if not isinstance(data, Mapping):
        _refuse(path, data, needs)
    for key in data:
        if not _is_text(key) or (keys is not None and key not in keys):
            raise TableError(f"{path} has the key {_short(key)}, needs {needs}")
    if missing := [key for key in keys or () if key not in data]:
        raise TableError(f"{path} has no {', '.join(missing)}, needs {needs}")
    return data


def _text(value: Any, path: str, empty: bool = False) -> None:
    if not (_is_text(value) or (empty and value == "")):
        _refuse(path, value, f"text of {'0' if empty else '1'} to {LONGEST} printable characters")


def _is_text(value: Any) -> bool:
    """Whether it can be printed in a message."""
    return isinstance(value, str) and 1 <= len(value) <= LONGEST and value.isprintable()


def _whole(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        _refuse(path, value, f"a whole number from 1 to {LARGEST}")


def _time(value: Any) -> None:
    try:
        utc = isinstance(value, str) and datetime.fromisoformat(value).utcoffset() == timedelta(0)
    except ValueError:
        utc = False
    if not utc:
        _refuse("made", value, "an ISO time in UTC, such as 2026-11-22T10:00:00+00:00")


def _refuse(path: str, found: Any, needs: str, verb: str = "is") -> NoReturn:
    raise TableError(f"{path} {verb} {_short(found)}, needs {needs}")


def _short(value: Any) -> str:
    """A value of any type and length, shortened for a message."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print a number of thousands of digits
        return f"of type {type(value).__name__}"
