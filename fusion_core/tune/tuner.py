"""Measures a table of this machine: what `fusion-core tune` does between its arguments and its output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from fusion_core.errors import BackendError
from fusion_core.patterns.definition import Pattern
from fusion_core.site import Device, dtype_name
from fusion_core.tables.machine import Machine
from fusion_core.tables.schema import is_base_line
from fusion_core.tables.table import Row, Table, TableError
from fusion_core.tune.measure import Bench, Measured
from fusion_core.tune.plan import Plan
from fusion_core.tune.ranks import Ranks
from fusion_core.tune.sweep import Note, sweep
from fusion_core.tune.timers import Timer

HIDDEN = (2048, 4096, 8192)
TOKENS = tuple(2**power for power in range(15))


@dataclass(frozen=True)
class Tuned:
    """The result of a tuning run.

    Attributes:
        table: The table; None if only the unfused path was measured, as it could decide nothing.
        notes: The points and paths without a time, with reasons.
    """

    table: Table | None
    notes: tuple[Note, ...]


def tune(
    plan: Plan,
    ranks: Ranks,
    timer: Timer,
    patterns: Sequence[Pattern],
    hidden: Sequence[int] = HIDDEN,
    tokens: Sequence[int] = TOKENS,
    budget: float = 600.0,
    command: str = "",
    progress: Callable[[int, str], None] = lambda done, what: None,
) -> Tuned:
    """Measure patterns at every size while there is time. Collective: every rank of the group calls it.

    Args:
        plan: The paths.
        ranks: The ranks.
        timer: The timer for their devices.
        patterns: The patterns, in the order in which they are measured.
        hidden: Hidden sizes.
        tokens: Token counts, in rising order.
        budget: Seconds after which no further point is started.
        command: The command that the table records.
        progress: Called with the number of points done and the name of the next one.

    Raises:
        BackendError: if the ranks' machines differ.
        TableError: if the table would refuse a name, before anything is measured.
    """
    machine = Machine.here(ranks.size, Device.of(plan.device))
    machines = ranks.gather(machine.to_dict())
    for rank, other in enumerate(machines):
        if differing := [name for name, value in machines[0].items() if other[name] != value]:
            name = differing[0]
            raise BackendError(f"rank {rank} has {name} {other[name]!r}, needs {machines[0][name]!r} as rank 0 has it")
    _check_names(plan, ranks, patterns, machine, command)
    bench = Bench(plan, ranks, timer, max(tokens))
    by_name = {pattern.name: pattern for pattern in patterns}

    def measure(pattern: str, size: int, count: int, without: Collection[str]) -> Measured:
        return bench.measure(by_name[pattern], size, count, without)

    dtype = dtype_name(plan.dtype)
    swept = sweep(list(by_name), hidden, tokens, dtype, measure, ranks, budget, progress)
    if all(is_base_line(name) for row in swept.rows for name in row.us):
        return Tuned(None, swept.notes)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return Tuned(Table(machine, swept.rows, made, command), swept.notes)


def _check_names(plan: Plan, ranks: Ranks, patterns: Sequence[Pattern], machine: Machine, command: str) -> None:
    """Raise on all ranks if a table would refuse these names, before they are measured."""
    wrong = None
    try:
        names = {pattern.name: [column.name for column in plan.columns(pattern)] for pattern in patterns}
        rows = (Row(name, dtype_name(plan.dtype), 1, 1, dict.fromkeys(own, 1.0)) for name, own in names.items())
        Table(machine, tuple(rows), datetime.now(UTC).isoformat(timespec="seconds"), command)
    except TableError as error:
        wrong = str(error)
    for rank, found in enumerate(ranks.gather(wrong)):
        if found is not None:
            raise TableError(f"the table that rank {rank} is to write would be refused: {found}")
