"""The order in which points are measured, and which are skipped: hopeless paths, and sizes without time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fusion_core.tables.schema import UNFUSED, is_base_line
from fusion_core.tables.table import Row
from fusion_core.tune.measure import Measured

HOPELESS = 3.0
"""A path that takes this many times as long as the fastest is not measured at more tokens."""
GROWS = 1.5
"""A path that takes this many times as long as at the previous point is bound by its size, not by its launch."""

Us = Mapping[str, float]


class Deciding(Protocol):
    """The part of `fusion_core.tune.ranks.Ranks` that a sweep uses."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class Note:
    """Why a path has no time at a point; `UNFUSED` means the whole point."""

    pattern: str
    hidden: int
    tokens: int
    path: str
    why: str


@dataclass(frozen=True)
class Sweep:
    """The measurements.

    Attributes:
        rows: The points; each pattern has the same token counts at every hidden size.
        notes: The points and paths without a time, with reasons.
    """

    rows: tuple[Row, ...]
    notes: tuple[Note, ...]


@dataclass
class _Block:
    """One pattern at one hidden size, measured from few tokens to many."""

    pattern: str
    hidden: int
    us: dict[int, Us] = field(default_factory=dict)


def sweep(
    patterns: Sequence[str],
    hidden: Sequence[int],
    tokens: Sequence[int],
    dtype: str,
    measure: Callable[[str, int, int, Collection[str]], Measured],
    ranks: Deciding,
    budget: float,
    progress: Callable[[int, str], None] = lambda done, what: None,
    clock: Callable[[], float] = time.monotonic,
) -> Sweep:
    """Measure every pattern at every size, pattern by pattern and hidden size by hidden size, while there is time.

    Args:
        patterns: Names, in the order in which they are measured.
        hidden: Hidden sizes.
        tokens: Token counts, in rising order.
        dtype: The dtype of x, for the rows.
        measure: Measures a point, given the pattern, the hidden size, the token count and the paths to skip.
        ranks: Broadcasts rank 0's decisions.
        budget: Seconds after which no further point is started.
        progress: Called with the number of points done and the name of the next one.
        clock: Returns the time in seconds.
    """
    began = clock()
    blocks: list[_Block] = []
    notes: list[Note] = []
    last = 0.0
    for index, (pattern, size) in enumerate((pattern, size) for pattern in patterns for size in hidden):
        block, start = _Block(pattern, size), clock()
        blocks.append(block)
        # a table takes only whole blocks, so one that is unlikely to finish is not started
        late = ranks.broadcast(clock() - began + last > budget)
        dropped: dict[str, str] = {}
        for place, count in enumerate(tokens):
            progress(index * len(tokens) + place, f"{pattern}, hidden {size}, tokens {count}")
            if late or (late := ranks.broadcast(clock() - began > budget)):
                notes.append(Note(pattern, size, count, UNFUSED, f"the time of {budget:g} s is over"))
                continue
            found = measure(pattern, size, count, dropped)
            notes += [Note(pattern, size, count, path, why) for path, why in {**dropped, **found.notes}.items()]
            if UNFUSED not in found.us:
                # more tokens need more memory, so a failure here would repeat there
                why = f"not begun after {count} tokens failed"
                notes += [Note(pattern, size, more, UNFUSED, why) for more in tokens[place + 1 :]]
                break
            block.us[count] = found.us
            dropped |= _hopeless(block.us, dropped)
        if len(block.us) == len(tokens):
            last = clock() - start
    progress(len(patterns) * len(hidden) * len(tokens), "done")
    rows, cut = _whole(blocks, dtype)
    return Sweep(rows, (*notes, *cut))


def _hopeless(points: Mapping[int, Us], dropped: Collection[str]) -> dict[str, str]:
    """Paths far behind the fastest at the last two points, not catching up and bound by size, with the reason.

    A path whose time does not grow yet is bound by its launch, and may be the fastest at more tokens.
    """
    if len(points) < 2:
        return {}
    (count, before), (more, after) = list(points.items())[-2:]
    best, best_after = min(before.values()), min(after.values())
    found = {}
    for name in after:
        if is_base_line(name) or name in dropped or name not in before:
            continue
        times, times_after = before[name] / best, after[name] / best_after
        grows = after[name] >= GROWS * before[name]
        if times >= HOPELESS and times_after >= max(HOPELESS, 0.98 * times) and grows:
            found[name] = f"not measured: at {count} and {more} tokens it took {times:.1f} and {times_after:.1f} times "
            found[name] += "as long as the fastest path"
    return found


def _whole(blocks: Sequence[_Block], dtype: str) -> tuple[tuple[Row, ...], list[Note]]:
    """As many rows as possible with the same token counts at every hidden size of a pattern; and the points cut."""
    rows: list[Row] = []
    cut: list[Note] = []
    for pattern in dict.fromkeys(block.pattern for block in blocks):
        own = [block for block in blocks if block.pattern == pattern and block.us]
        choices = [frozenset(block.us) for block in own]
        if not choices:
            continue

        def kept(counts: frozenset[int], own: Sequence[_Block] = own) -> tuple[int, int]:
            return len(counts) * sum(counts <= block.us.keys() for block in own), len(counts)

        chosen = max(choices, key=kept)
        for block in own:
            whole = chosen <= block.us.keys()
            for count, us in block.us.items():
                if whole and count in chosen:
                    rows.append(Row(pattern, dtype, block.hidden, count, us))
                else:
                    why = "measured, and left out: every hidden size of a pattern needs the same token counts"
                    cut.append(Note(pattern, block.hidden, count, UNFUSED, why))
    return tuple(rows), cut
