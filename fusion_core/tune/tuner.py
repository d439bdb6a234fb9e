"""A table of this machine, measured: what `fusion-core tune` does between its arguments and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from fusion_core.errors import BackendError
from fusion_core.patterns.definition import Pattern
from fusion_core.site import Device, dtype_name
from fusion_core.tables.machine import Machine
from fusion_core.tables.table import Row, Table, TableError
from fusion_core.tune.clocks import Clock
from fusion_core.tune.measure import Bench, Measured
from fusion_core.tune.plan import Plan
from fusion_core.tune.ranks import Ranks
from fusion_core.tune.sweep import Note, sweep

HIDDEN = (2048, 4096, 8192)
TOKENS = tuple(2**power for power in range(15))


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        table: None where nothing was measured but the unfused path: it would decide nothing.
        notes: What has no figure, and why.
    """

    table: Table | None
    notes: tuple[Note, ...]


def tune(
    plan: Plan,
    ranks: Ranks,
    clock: Clock,
    patterns: Sequence[Pattern],
    hidden: Sequence[int] = HIDDEN,
    tokens: Sequence[int] = TOKENS,
    budget: float = 600.0,
    command: str = "",
    said: Callable[[int, str], None] = lambda done, what: None,
) -> Tuned:
    """Measure patterns at every size while there is time. Collective: every rank of the group calls it.

    Args:
        plan: The paths.
        ranks: The ranks.
        clock: Of their devices.
        patterns: In the order in which they are measured.
        hidden: Hidden sizes.
        tokens: Token counts, in rising order.
        budget: Seconds after which no further point is begun.
        command: What the table says made it.
        said: Told how many points are done, and what comes next.

    Raises:
        BackendError: where the ranks do not run on one kind of machine.
        TableError: where the table would refuse a name, before anything is measured.
    """
    machine = Machine.here(ranks.size, Device.of(plan.device))
    machines = ranks.gather(machine.to_dict())
    for rank, other in enumerate(machines):
        if differing := [name for name, value in machines[0].items() if other[name] != value]:
            name = differing[0]
            raise BackendError(f"rank {rank} has {name} {other[name]!r}, needs {machines[0][name]!r} as rank 0 has it")
    _check_names(plan, ranks, patterns, machine, command)
    bench = Bench(plan, ranks, clock, max(tokens))
    by_name = {pattern.name: pattern for pattern in patterns}

    def measure(pattern: str, size: int, count: int, without: Collection[str]) -> Measured:
        return bench.measure(by_name[pattern], size, count, without)

    dtype = dtype_name(plan.dtype)
    swept = sweep(list(by_name), hidden, tokens, dtype, measure, ranks, budget, said)
    if not any(len(row.us) > 1 for row in swept.rows):
        return Tuned(None, swept.notes)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return Tuned(Table(machine, swept.rows, made, command), swept.notes)


def _check_names(plan: Plan, ranks: Ranks, patterns: Sequence[Pattern], machine: Machine, command: str) -> None:
    """Raise on all ranks where the table could not be made of these names, however long they were measured."""
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
