"""What each way to run one place takes, beside the unfused path, at one size.

A run is a chain of sites. Before each the device's caches are flushed, as the weights between two sites of a model do,
and a producer, one kernel, writes x anew, as a model's matrix product does: so the unfused path may reduce x in place,
as Inductor does with a buffer of its graph, and no path pays for a copy that another is spared. A run of flushes and
producers alone is timed too, and taken off. What a site adds to the residual is the next site's residual.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from fusion_core.errors import FusionError
from fusion_core.patterns.definition import Pattern
from fusion_core.run_time import fallen_back
from fusion_core.site import Site
from fusion_core.tables.schema import LEAST_US, UNFUSED
from fusion_core.tune.clocks import Clock, Run
from fusion_core.tune.plan import Column, Form, Plan, tensors
from fusion_core.tune.ranks import Ranks, said
from fusion_core.vocabulary.operation import Symbol

PRODUCER = "producer"
MOST_DIFFERENCE = 0.05
"""Mean distance to the unfused path's results, as a share of their mean magnitude: roundings stay far below."""
ROWS = 64
"""Of a result that are compared, from the first to the last."""
COPIES = 16
"""Tensors of x's size that a point may take at once, all paths together."""
SETTLED = 1024
"""Tokens with which compiled code runs first: it picks its own kernel's configuration then, once for all sizes, and
with few tokens all of them look alike."""

Call = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Measured:
    """One point.

    Attributes:
        us: Names of paths → microseconds a site. Empty where the unfused path did not run.
        notes: Names of paths that have no figure → why; `UNFUSED` where the whole point has none.
    """

    us: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Bench:
    """Measures points, on all ranks of a process group together.

    Args:
        plan: The paths.
        ranks: The ranks.
        clock: Of their devices.
        most_tokens: The most tokens of all points to come.
    """

    def __init__(self, plan: Plan, ranks: Ranks, clock: Clock, most_tokens: int) -> None:
        self._plan = plan
        self._ranks = ranks
        self._clock = clock
        self._settled = min(most_tokens, SETTLED)
        self._warm: set[tuple[Form, str, int]] = set()

    def measure(
        self,
        pattern: Pattern,
        hidden: int,
        tokens: int,
        without: Collection[str] = (),
        whole: Mapping[str, Call] = MappingProxyType({}),
    ) -> Measured:
        """One point.

        Args:
            pattern: What stands at the place.
            hidden: Size of x's last dimension.
            tokens: Its rows.
            without: Names of paths that are left out.
            whole: Other ways, by name, that write x themselves: from x's source, of which x is 1.0 times, and the
                tensors beside x to the results of the unfused path's place.
        """
        try:
            with torch.no_grad():
                return self._measure(pattern, hidden, tokens, without, whole)
        finally:
            self._clock.drop()

    def _measure(
        self, pattern: Pattern, hidden: int, tokens: int, without: Collection[str], whole: Mapping[str, Call]
    ) -> Measured:
        columns, notes = self._columns(pattern, hidden, tokens, without)
        if UNFUSED in notes:
            return Measured({}, notes)
        main = columns[0][1]
        size = tokens * hidden * main.inputs["x"].dtype.itemsize
        shortages = self._ranks.gather(self._clock.shortage(COPIES * size))
        for rank, shortage in enumerate(shortages):
            if shortage is not None:
                return Measured({}, {UNFUSED: f"rank {rank}: {shortage}, needs {COPIES * size / 2**20:.0f} MiB"})
        point = _Point(self._plan, self._ranks, self._clock, pattern, main)
        for step in (partial(self._warm_up, pattern, columns, hidden), point.make):
            _, why = self._ranks.attempt(step)
            if why is not None:
                return Measured({}, {UNFUSED: why})
        runs: dict[str, Run] = {}
        sites = self._clock.sites(size)
        for column, site in columns:
            calls: list[Call] = []
            distance, why = self._ranks.attempt(partial(self._first, point, calls, column, site))
            if why is None and distance > MOST_DIFFERENCE:
                why = f"its results differ from the unfused path's by {distance:.2g} of their magnitude"
            if why is None:
                run = point.chain(calls[0], column.form, sites)
                _, why = self._ranks.attempt(partial(self._record, runs, column, run))
            if why is not None:
                runs.pop(column.name, None)
                notes[column.name] = why
                if column.strategy is None:
                    return Measured({}, notes)
        for name, call in whole.items():
            distance, why = self._ranks.attempt(partial(self._first_whole, point, call, columns[0][0]))
            if why is None and distance > MOST_DIFFERENCE:
                why = f"its results differ from the unfused path's by {distance:.2g} of their magnitude"
            if why is None:
                run = point.chain(call, columns[0][0].form, sites, produces=True)
                _, why = self._ranks.attempt(partial(self._record_whole, runs, name, run))
            if why is not None:
                runs.pop(name, None)
                notes[name] = why
        _, why = self._ranks.attempt(
            partial(self._record_whole, runs, PRODUCER, point.chain(None, columns[0][0].form, sites))
        )
        if why is not None:
            return Measured({}, {**notes, UNFUSED: why})
        times, failures = self._timed(runs, size, columns)
        notes |= failures
        for name in (PRODUCER, UNFUSED):
            if name in notes:  # no other figure says anything then
                return Measured({}, {UNFUSED: notes.pop(name), **notes})
        found = self._ranks.slowest(times)
        nothing = found.pop(PRODUCER)
        # no path is faster than nothing: where the clock says so, it cannot tell
        us = {name: round(max((time - nothing) / sites, LEAST_US), 3) for name, time in found.items()}
        return Measured(us, notes)

    def _timed(
        self, runs: Mapping[str, Run], size: int, columns: Sequence[tuple[Column, Site]]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """The times of the runs that ran to the end on every rank, as what they are called; why the others did not."""
        times, failures = self._clock.times(runs, size)
        mine: dict[str, str] = {}
        for column, _ in columns:
            if column.name in times:
                try:
                    self._check(column)
                except RuntimeError as error:
                    mine[column.name] = said(error)
        failures |= self._ranks.failed(mine)
        return {name: time for name, time in times.items() if name not in failures}, failures

    def _columns(
        self, pattern: Pattern, hidden: int, tokens: int, without: Collection[str]
    ) -> tuple[list[tuple[Column, Site]], dict[str, str]]:
        """The paths that can run on every rank, each with its place, the unfused one first; why the others cannot."""
        usable: list[tuple[Column, Site]] = []
        mine: dict[str, str] = {}
        for column in self._plan.columns(pattern):
            if column.name in without:
                continue
            try:
                site = self._plan.site(pattern, column.form, hidden, tokens)
            except FusionError as error:
                mine[column.name] = str(error)
                continue
            if reasons := self._plan.refusals(column, pattern, site):
                mine[column.name] = "; ".join(map(str, reasons))
            else:
                usable.append((column, site))
        notes: dict[str, str] = {}
        ranks = self._ranks.gather(([column.name for column, _ in usable], mine))
        for names, refused in ranks:
            for name in names:
                lacking = [rank for rank, (other, _) in enumerate(ranks) if name not in other]
                if lacking:
                    why = ranks[lacking[0]][1].get(name, "its backend cannot be used there")
                    notes.setdefault(name, f"rank {lacking[0]}: {why}")
            for name, why in refused.items():
                notes.setdefault(name, why)
        return [(column, site) for column, site in usable if column.name not in notes], notes

    def _warm_up(self, pattern: Pattern, columns: Sequence[tuple[Column, Site]], hidden: int) -> float:
        """Compile what follows the all_reduce, where that has not been done, and have it choose its kernel."""
        for form in dict.fromkeys(column.form for column, _ in columns):
            key = form, pattern.name, hidden
            if key in self._warm:
                continue
            site = self._plan.site(pattern, form, hidden, self._settled)
            rest = self._plan.rest(pattern, form, site)
            if any(column.form == form and self._plan.path(column, pattern, site).needs_rest for column, _ in columns):
                given = tensors(site, 0, self._plan.device)
                rest(given["x"], [given[name] for name in rest.place.names])
                self._clock.settle()
            self._warm.add(key)
        return 0.0

    def _first(self, point: _Point, calls: list[Call], column: Column, site: Site) -> float:
        """Run a path once, outside of any capture: what it makes and compiles it makes now. How far it is off.

        The path is added to ``calls``.
        """
        call = point.call(column, site)
        calls.append(call)
        distance = point.compare(call, column)
        self._clock.settle()
        return distance

    def _record(self, runs: dict[str, Run], column: Column, run: Run) -> float:
        runs[column.name] = self._clock.record(run)
        self._check(column)
        return 0.0

    def _first_whole(self, point: _Point, call: Call, main: Column) -> float:
        distance = point.compare(call, main, produces=True)
        self._clock.settle()
        return distance

    def _record_whole(self, runs: dict[str, Run], name: str, run: Run) -> float:
        runs[name] = self._clock.record(run)
        return 0.0

    def _check(self, column: Column) -> None:
        """Raise where what ran was not the strategy: its times would be those of the unfused path."""
        if column.strategy is not None and (reasons := fallen_back(column.name, self._ranks.name)):
            raise RuntimeError(f"it runs unfused: {'; '.join(map(str, reasons))}")


class _Point:
    """The tensors of one point, and runs over them."""

    def __init__(self, plan: Plan, ranks: Ranks, clock: Clock, pattern: Pattern, site: Site) -> None:
        self._plan = plan
        self._ranks = ranks
        self._clock = clock
        self._pattern = pattern
        self._site = site
        self._references: dict[Form, list[Tensor]] = {}

    def make(self) -> float:
        """Allocate; after this nothing of the point's own is allocated but results."""
        given = tensors(self._site, self._ranks.rank, self._plan.device)
        self._source = given.pop("x")
        self._x = torch.empty_like(self._source)
        self._others = list(given.values())
        self._names = list(given)
        return 0.0

    def produce(self) -> None:
        """Write x anew."""
        torch.mul(self._source, 1.0, out=self._x)

    def call(self, column: Column, site: Site) -> Call:
        """A path as a function of x and the other tensors."""
        path = self._plan.path(column, self._pattern, site)
        if column.strategy is not None:
            return path
        rest, group = path.rest, path.place.group

        def in_place(x: Tensor, others: Sequence[Tensor]) -> Sequence[Tensor]:
            # also where the sum itself is handed out, which Path copies: Inductor does not
            torch.ops._c10d_functional.all_reduce_(x, "sum", group)
            torch.ops._c10d_functional.wait_tensor(x)
            return rest(x, others)

        return in_place

    def compare(self, call: Call, column: Column, produces: bool = False) -> float:
        """How far a path's results are from the unfused path's at a place of its form."""
        if column.form not in self._references and column.strategy is not None:
            place = self._plan.rest(self._pattern, column.form, self._site).place
            self.produce()
            self._references[column.form] = [_rows(each) for each in place.definition(self._x, *self._others)]
        self.produce()
        found = [_rows(each) for each in call(self._source if produces else self._x, self._others)]
        reference = self._references.setdefault(column.form, found)
        return max(_distance(one, other) for one, other in zip(found, reference, strict=True))

    def chain(self, call: Call | None, form: Form, sites: int, produces: bool = False) -> Run:
        """A run of sites; of their producers alone without a call, and without ours where the call writes x itself."""
        carried = [
            (self._names.index(into), form.live.index(out))
            for into, out in _carried(self._pattern).items()
            if into in self._names and out in form.live
        ]

        def run() -> None:
            others = list(self._others)
            for _ in range(sites):
                self._clock.flush()
                if not produces:
                    self.produce()
                if call is None:
                    continue
                results = call(self._source if produces else self._x, others)
                for into, out in carried:
                    others[into] = results[out]

        return run


def _carried(pattern: Pattern) -> dict[str, str]:
    """What is added to the stream → the output that is the sum: a residual and the next site's."""
    found: dict[str, str] = {}
    for name, symbol in zip(pattern.outputs, pattern.values, strict=True):
        if symbol.step is not None and symbol.step.operation.commutative:
            operands = [o for o in symbol.step.operands.values() if isinstance(o, Symbol) and o.step is None]
            found |= {operand.name: name for operand in operands if operand.name in pattern.elementwise}
    return found


def _rows(result: Tensor) -> Tensor:
    """A copy of some of the rows in float32: enough to see a wrong result, and little memory."""
    if result.dim() > 1 and result.shape[0] > ROWS:
        rows = torch.linspace(0, result.shape[0] - 1, ROWS, device=result.device).round().long()
        result = result[rows]
    return result.to(torch.float32, copy=True)


def _distance(found: Tensor, reference: Tensor) -> float:
    """Mean distance as a share of the mean magnitude; infinite for what is not finite, or has another shape."""
    if found.shape != reference.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - reference).abs().mean() / reference.abs().mean().clamp(min=1e-30))
