"""Measures the time of every path at one site and one size, the unfused path included.

A run is a chain of sites. Before each site the device's caches are flushed, as the weights between two sites of a model
would do, and a producer, one kernel, writes x again, as a model's matrix product does. So the unfused path may reduce x
in place, as Inductor does with a buffer of its graph, and no path pays for a copy that another avoids. A run of flushes
and producers alone is timed too, and its time is subtracted. A site's sum is the residual of the next site.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from fusion_core.errors import FusionError
from fusion_core.fallback import fallen_back
from fusion_core.patterns.definition import Pattern
from fusion_core.site import Site
from fusion_core.tables.schema import LEAST_US, UNFUSED
from fusion_core.tune.plan import Column, Form, Plan, tensors
from fusion_core.tune.ranks import Ranks, message_of
from fusion_core.tune.timers import Run, Timer
from fusion_core.vocabulary.operation import Symbol

PRODUCER = "producer"
MOST_DIFFERENCE = 0.05
"""Largest mean error against the unfused path's results, as a share of their mean magnitude: far above rounding."""
ROWS = 64
"""Rows of a result that are compared, evenly spaced."""
COPIES = 16
"""The most tensors of x's size that a point may need at once, over all paths."""
SETTLED = 1024
"""Tokens of the first run of compiled code. It then picks its kernel's configuration, once for all sizes; with few
tokens all configurations take the same time."""

Call = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Measured:
    """The times of one point: a pattern, a hidden size and a token count.

    Attributes:
        us: Names of paths → microseconds per site. Empty if the unfused path did not run.
        notes: Names of paths without a time → the reason; `UNFUSED` if the whole point has none.
    """

    us: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class Bench:
    """Measures points, on all ranks of a process group together.

    Args:
        plan: The paths.
        ranks: The ranks.
        timer: The timer for their devices.
        most_tokens: The largest token count that will be measured.
    """

    def __init__(self, plan: Plan, ranks: Ranks, timer: Timer, most_tokens: int) -> None:
        self._plan = plan
        self._ranks = ranks
        self._timer = timer
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
        """Measure one point.

        Args:
            pattern: The site's pattern.
            hidden: Size of x's last dimension.
            tokens: Rows of x.
            without: Names of paths to skip.
            whole: More paths, by name, that write x themselves: functions from x's source (x is 1.0 times it) and the
                other tensors to the results of the unfused path's site.
        """
        try:
            with torch.no_grad():
                return self._measure(pattern, hidden, tokens, without, whole)
        finally:
            self._timer.drop()

    def _measure(
        self, pattern: Pattern, hidden: int, tokens: int, without: Collection[str], whole: Mapping[str, Call]
    ) -> Measured:
        columns, notes = self._columns(pattern, hidden, tokens, without)
        if UNFUSED in notes:
            return Measured({}, notes)
        main = columns[0][1]
        size = tokens * hidden * main.inputs["x"].dtype.itemsize
        shortages = self._ranks.gather(self._timer.shortage(COPIES * size))
        for rank, shortage in enumerate(shortages):
            if shortage is not None:
                return Measured({}, {UNFUSED: f"rank {rank}: {shortage}, needs {COPIES * size / 2**20:.0f} MiB"})
        point = _Point(self._plan, self._ranks, self._timer, pattern, main)
        for step in (partial(self._warm_up, pattern, columns, hidden), point.make):
            _, why = self._ranks.attempt(step)
            if why is not None:
                return Measured({}, {UNFUSED: why})
        runs: dict[str, Run] = {}
        sites = self._timer.sites(size)
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
                if column.name == UNFUSED:
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
            if name in notes:  # without these two no other time means anything
                return Measured({}, {UNFUSED: notes.pop(name), **notes})
        found = self._ranks.slowest(times)
        nothing = found.pop(PRODUCER)
        # no path takes less time than the producers alone: a smaller difference is the clock's noise
        us = {name: round(max((time - nothing) / sites, LEAST_US), 3) for name, time in found.items()}
        return Measured(us, notes)

    def _timed(
        self, runs: Mapping[str, Run], size: int, columns: Sequence[tuple[Column, Site]]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """The times of the runs that completed on every rank as what they claim to be, and the others' errors."""
        times, failures = self._timer.times(runs, size)
        mine: dict[str, str] = {}
        for column, _ in columns:
            if column.name in times:
                try:
                    self._check(column)
                except RuntimeError as error:
                    mine[column.name] = message_of(error)
        failures |= self._ranks.failed(mine)
        return {name: time for name, time in times.items() if name not in failures}, failures

    def _columns(
        self, pattern: Pattern, hidden: int, tokens: int, without: Collection[str]
    ) -> tuple[list[tuple[Column, Site]], dict[str, str]]:
        """The paths that can run on every rank, each with its site, the unfused one first; and the others' reasons."""
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
        """Compile the code after the all_reduce if that has not been done, and let it choose its kernel."""
        for form in dict.fromkeys(column.form for column, _ in columns):
            key = form, pattern.name, hidden
            if key in self._warm:
                continue
            site = self._plan.site(pattern, form, hidden, self._settled)
            rest = self._plan.rest(pattern, form, site)
            if any(column.form == form and self._plan.path(column, pattern, site).needs_rest for column, _ in columns):
                given = tensors(site, 0, self._plan.device)
                rest(given["x"], [given[name] for name in rest.place.names])
                self._timer.settle()
            self._warm.add(key)
        return 0.0

    def _first(self, point: _Point, calls: list[Call], column: Column, site: Site) -> float:
        """Run a path once outside of any capture, so that it allocates and compiles now; returns its error.

        The path is added to ``calls``.
        """
        call = point.call(column, site)
        calls.append(call)
        distance = point.compare(call, column)
        self._timer.settle()
        return distance

    def _record(self, runs: dict[str, Run], column: Column, run: Run) -> float:
        own = self._plan.collectives.get(column.collective or "")
        with nullcontext() if own is None else own.capture():
            runs[column.name] = self._timer.record(run)
        self._check(column)
        return 0.0

    def _first_whole(self, point: _Point, call: Call, main: Column) -> float:
        distance = point.compare(call, main, produces=True)
        self._timer.settle()
        return distance

    def _record_whole(self, runs: dict[str, Run], name: str, run: Run) -> float:
        runs[name] = self._timer.record(run)
        return 0.0

    def _check(self, column: Column) -> None:
        """Raise if the strategy fell back: its times would be those of the unfused path."""
        if column.strategy is not None and (reasons := fallen_back(column.name, self._ranks.name)):
            raise RuntimeError(f"it runs unfused: {'; '.join(map(str, reasons))}")


class _Point:
    """The tensors of one point, and the runs that use them."""

    def __init__(self, plan: Plan, ranks: Ranks, timer: Timer, pattern: Pattern, site: Site) -> None:
        self._plan = plan
        self._ranks = ranks
        self._timer = timer
        self._pattern = pattern
        self._site = site
        self._references: dict[Form, list[Tensor]] = {}

    def make(self) -> float:
        """Allocate the tensors; after this the point allocates only results."""
        given = tensors(self._site, self._ranks.rank, self._plan.device)
        self._source = given.pop("x")
        self._x = torch.empty_like(self._source)
        self._others = list(given.values())
        self._names = list(given)
        return 0.0

    def produce(self) -> None:
        """Write x again."""
        torch.mul(self._source, 1.0, out=self._x)

    def call(self, column: Column, site: Site) -> Call:
        """A path as a function of x and the other tensors."""
        path = self._plan.path(column, self._pattern, site)
        if column.strategy is not None:
            return path
        rest, group = path.rest, path.place.group
        if column.collective is not None:
            own = self._plan.collectives[column.collective].run
            return lambda x, others: rest(own(x), others)

        def in_place(x: Tensor, others: Sequence[Tensor]) -> Sequence[Tensor]:
            # in place even if the sum is a result: Path copies it then, Inductor does not
            torch.ops._c10d_functional.all_reduce_(x, "sum", group)
            torch.ops._c10d_functional.wait_tensor(x)
            return rest(x, others)

        return in_place

    def compare(self, call: Call, column: Column, produces: bool = False) -> float:
        """The largest error of a path's results against those of the unfused path at a site of its form."""
        if column.form not in self._references and column.name != UNFUSED:
            place = self._plan.rest(self._pattern, column.form, self._site).place
            self.produce()
            self._references[column.form] = [_rows(each) for each in place.definition(self._x, *self._others)]
        self.produce()
        found = [_rows(each) for each in call(self._source if produces else self._x, self._others)]
        reference = self._references.setdefault(column.form, found)
        return max(_distance(one, other) for one, other in zip(found, reference, strict=True))

    def chain(self, call: Call | None, form: Form, sites: int, produces: bool = False) -> Run:
        """A run of sites: of producers alone if ``call`` is None, and without them if the call writes x itself."""
        carried = [
            (self._names.index(into), form.live.index(out))
            for into, out in _carried(self._pattern).items()
            if into in self._names and out in form.live
        ]

        def run() -> None:
            others = list(self._others)
            for _ in range(sites):
                self._timer.flush()
                if not produces:
                    self.produce()
                if call is None:
                    continue
                results = call(self._source if produces else self._x, others)
                for into, out in carried:
                    others[into] = results[out]

        return run


def _carried(pattern: Pattern) -> dict[str, str]:
    """The input that is added to the residual stream → the output that is the sum, the next site's residual."""
    found: dict[str, str] = {}
    for name, symbol in zip(pattern.outputs, pattern.values, strict=True):
        if symbol.step is not None and symbol.step.operation.commutative:
            operands = [o for o in symbol.step.operands.values() if isinstance(o, Symbol) and o.step is None]
            found |= {operand.name: name for operand in operands if operand.name in pattern.elementwise}
    return found


def _rows(result: Tensor) -> Tensor:
    """A copy of some rows in float32: enough to detect a wrong result, with little memory."""
    if result.dim() > 1 and result.shape[0] > ROWS:
        rows = torch.linspace(0, result.shape[0] - 1, ROWS, device=result.device).round().long()
        result = result[rows]
    return result.to(torch.float32, copy=True)


def _distance(found: Tensor, reference: Tensor) -> float:
    """Mean error as a share of the mean magnitude; infinite if a value is not finite or the shapes differ."""
    if found.shape != reference.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - reference).abs().mean() / reference.abs().mean().clamp(min=1e-30))
