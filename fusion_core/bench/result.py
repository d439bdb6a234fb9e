"""The measurements as values: a row for each batch size."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusion_core.report.report import Report


@dataclass(frozen=True)
class Fusion:
    """What fusion_core did to the graphs of one call.

    Attributes:
        sites: The number of all_reduces.
        fused: The number of those that a strategy runs.
        strategies: Name → the number of sites that it runs at.
        fell_back: The reasons why a chosen strategy runs unfused, as text.
        reports: The report of each graph.
    """

    sites: int
    fused: int
    strategies: dict[str, int]
    fell_back: tuple[str, ...]
    reports: tuple[Report, ...]

    @classmethod
    def of(cls, reports: Sequence[Report]) -> Fusion:
        """The sum over the reports. Call it after the model ran: some strategies fall back when they first run."""
        sites = [site for report in reports for site in report.sites]
        running = [site for site in sites if site.strategy is not None and not site.run_time]
        fell_back = dict.fromkeys(f"{site.strategy}: {reason}" for site in sites for reason in site.run_time)
        counted = Counter(str(site.strategy) for site in running)
        return cls(len(sites), len(running), dict(counted), tuple(fell_back), tuple(reports))


@dataclass(frozen=True)
class Row:
    """One batch size.

    Attributes:
        batch: The batch size; None if the function takes none.
        plain_us: Microseconds of a call without fusion_core in each round: the median of the round's calls, on the
            slowest rank.
        fused_us: The same with fusion_core; rounds of the same index are adjacent in time.
        fusion: What was fused.
        difference: The largest difference between the results with and without fusion_core, over the largest magnitude.
            None if no result is a floating-point tensor.
        difference_limit: The largest ``difference`` that passes.
        repeated: The same as ``difference``, between two results without fusion_core.
        new_graph: Whether a graph was compiled for this batch size, instead of using the previous one's.
        steps: The number of calls in a round.
        compile_s: Side → seconds of its first calls, which compile.
        cudagraph_skips: How often torch skipped CUDA graphs in this row's compilations.
    """

    batch: int | None
    plain_us: tuple[float, ...]
    fused_us: tuple[float, ...]
    fusion: Fusion
    difference: float | None
    difference_limit: float
    repeated: float | None
    new_graph: bool
    steps: int
    compile_s: dict[str, float]
    cudagraph_skips: int

    @property
    def plain(self) -> float:
        """Microseconds of a call without fusion_core."""
        return statistics.median(self.plain_us)

    @property
    def fused(self) -> float:
        """Microseconds of a call with fusion_core."""
        return statistics.median(self.fused_us)

    @property
    def gain(self) -> float:
        """The speed-up: above 1, fusion_core is faster."""
        return self.plain / self.fused

    @property
    def gains(self) -> tuple[float, ...]:
        """The gain of each single round; their spread is the noise."""
        return tuple(plain / fused for plain, fused in zip(self.plain_us, self.fused_us, strict=True))

    def problem(self, fail_below: float | None) -> str:
        """What is wrong with this row; empty if nothing is."""
        where = "" if self.batch is None else f"batch {self.batch}: "
        for found, what in (
            (self.repeated, "two calls without fusion_core"),
            (self.difference, "results with and without fusion_core"),
        ):
            if found is not None and not found <= self.difference_limit:
                hint = ""
                if what.startswith("two"):
                    hint = "; a call must return the same each time: if it advances a cache, it has to rewind it"
                finite = math.isfinite(found)
                far = f"by {found:.3g} of the largest magnitude" if finite else "in shape or in where they are finite"
                return f"{where}{what} differ {far}, needs at most {self.difference_limit:g}{hint}"
        if fail_below is not None and self.gain < fail_below:
            return f"{where}gain is {self.gain:.3f}, needs at least {fail_below:g}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types. A difference that is not finite becomes None; `problem` reports it."""
        return {
            "batch": self.batch,
            "plain_us": round(self.plain, 2),
            "fused_us": round(self.fused, 2),
            "gain": round(self.gain, 4),
            "gain_by_round": [round(gain, 4) for gain in self.gains],
            "plain_rounds_us": [round(time, 2) for time in self.plain_us],
            "fused_rounds_us": [round(time, 2) for time in self.fused_us],
            "sites": self.fusion.sites,
            "fused_sites": self.fusion.fused,
            "strategies": self.fusion.strategies,
            "fell_back": list(self.fusion.fell_back),
            "difference": _number(self.difference),
            "difference_limit": self.difference_limit,
            "difference_of_plain_calls": _number(self.repeated),
            "new_graph": self.new_graph,
            "steps": self.steps,
            "compile_s": {name: round(seconds, 2) for name, seconds in self.compile_s.items()},
            "cudagraph_skips": self.cudagraph_skips,
            "reports": [report.to_dict() for report in self.fusion.reports],
        }


@dataclass(frozen=True)
class Outcome:
    """All measurements of a run.

    Attributes:
        rows: The rows in the order in which they ran.
        left_out: Batch sizes that were skipped because of the budget.
        mode: The mode of torch.compile.
        device: The device that was timed: ``"cuda"`` or ``"cpu"``.
    """

    rows: tuple[Row, ...]
    left_out: tuple[int | None, ...]
    mode: str
    device: str

    def problems(self, fail_below: float | None) -> tuple[str, ...]:
        """The problems of all rows; empty if there are none."""
        return tuple(problem for row in self.rows if (problem := row.problem(fail_below)))

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "rows": [row.to_dict() for row in self.rows], "left_out": list(self.left_out)}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
