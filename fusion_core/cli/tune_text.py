"""The measurements of ``fusion-core tune`` as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.table import Table as Grid

from fusion_core.cli.output import table
from fusion_core.cli.tune_drawing import drawing
from fusion_core.tables.schema import UNFUSED
from fusion_core.tables.table import Table
from fusion_core.tune.crossovers import Range, crossovers, series
from fusion_core.tune.sweep import Note


def grid(measured: Table, base: str = UNFUSED) -> Grid:
    """A table with a row for each range of token counts with one fastest path, beside one unfused path."""
    right = ("hidden", "tokens", "µs", "unfused µs", "times as fast")
    rows = table("pattern", "hidden", "tokens", "fastest", "µs", "unfused µs", "times as fast", right=right)
    before: tuple[str, int] | None = None
    for each in crossovers(measured, base):
        here = each.pattern, each.hidden
        pattern = each.pattern if before is None or before[0] != each.pattern else ""
        hidden = str(each.hidden) if here != before else ""
        tokens = str(each.first) if each.first == each.last else f"{each.first}–{each.last}"
        cells = (_ends(pair, each.first == each.last, digits) for pair, digits in _pairs(each))
        rows.add_row(pattern, hidden, tokens, each.path, *cells)
        before = here
    return rows


def _pairs(each: Range) -> tuple[tuple[tuple[float, float], int], ...]:
    """The columns' values at both ends, each with its number of decimals."""
    return (each.us, 1), (each.unfused, 1), (each.gains, 2)


def _ends(pair: tuple[float, float], one: bool, digits: int) -> str:
    first, last = (f"{number:.{digits}f}" for number in pair)
    return first if one else f"{first}–{last}"


def drawings(measured: Table, *, ascii_only: bool) -> Iterator[str]:
    """Bars for each pattern, at its largest hidden size."""
    every = series(measured)
    for pattern in dict.fromkeys(pattern for pattern, _, _ in every):
        key = max((key for key in every if key[0] == pattern), key=lambda key: key[2])
        head = f"{pattern}, hidden {key[2]}: times as fast as unfused, by tokens"
        yield f"{head}\n\n{drawing(every[key], ascii_only=ascii_only)}"


def notes(found: Sequence[Note]) -> Iterator[str]:
    """A line for each reason why times are missing: the paths, the patterns and the sizes without a time."""
    places: dict[tuple[str, str, str], list[Note]] = {}
    for note in found:
        kind = re.sub(r"\d+(\.\d+)?", "#", note.why)  # the reason without its numbers, which change with the size
        places.setdefault((kind, note.path, note.pattern), []).append(note)
    lines: dict[tuple[str, bool, str], tuple[str, list[str], list[str]]] = {}
    for (kind, path, pattern), own in places.items():
        counts: dict[str, list[str]] = {}
        for hidden in dict.fromkeys(note.hidden for note in own):
            counts.setdefault(_few(sorted(n.tokens for n in own if n.hidden == hidden)), []).append(str(hidden))
        where = "; ".join(f"hidden {', '.join(sizes)}, tokens {few}" for few, sizes in counts.items())
        _, paths, patterns = lines.setdefault((kind, path == UNFUSED, where), (own[0].why, [], []))
        paths.append(path)
        patterns.append(pattern)
    for (_, whole, where), (why, paths, patterns) in lines.items():
        what = "no figures" if whole else f"no figure of {_names(paths)}"
        yield f"{what} for {_names(patterns)} at {where}: {why}"


def _names(found: Sequence[str]) -> str:
    """The first two names and the number of others; ``--json`` lists all of them."""
    first, more = [*dict.fromkeys(found)][:2], len({*found}) - 2
    return f"{', '.join(first)} and {more} more" if more > 0 else ", ".join(first)


def _few(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts)) if len(counts) < 4 else f"{counts[0]} to {counts[-1]} ({len(counts)} of them)"
