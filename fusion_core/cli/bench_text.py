"""The measurements of ``fusion-core bench`` as text."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.table import Table

from fusion_core.bench.result import Outcome, Row
from fusion_core.cli.output import table
from fusion_core.cli.plotting import Bar, Line, Panel, bars


def grid(outcome: Outcome) -> Table:
    """A table with a row for each batch size."""
    right = ("batch", "plain µs", "fused µs", "gain", "in single rounds", "results differ by")
    rows = table(*right[:5], "fused sites", "strategies", right[5], right=right)
    for row in outcome.rows:
        rows.add_row(
            _batch(row),
            f"{row.plain:.1f}",
            f"{row.fused:.1f}",
            f"{row.gain:.3f}×",
            f"{min(row.gains):.3f}–{max(row.gains):.3f}",
            f"{row.fusion.fused} of {row.fusion.sites}",
            _strategies(row),
            _difference(row),
        )
    return rows


def drawing(outcome: Outcome, ascii_only: bool) -> str:
    """The gains as bars."""
    sign = "x" if ascii_only else "×"
    rows = [Bar(_batch(row), row.gain, min(row.gains), max(row.gains), f"{row.gain:.3f}{sign}") for row in outcome.rows]
    key = "to the right of the line: faster with fusion_core; shaded: the range of single rounds"
    return f"{key}\n\n{bars(rows, 1.0, ascii_only=ascii_only)}"


def panel(outcome: Outcome, title: str) -> Panel:
    """The gains as a curve."""
    points = [(row.batch or 1, row.gain) for row in outcome.rows]
    ranges = [(min(row.gains), max(row.gains)) for row in outcome.rows]
    return Panel(title, "batch size", "times faster with fusion_core", [Line("gain", points, ranges)], base=1.0)


def notes(outcome: Outcome, dynamic: bool, budget: float | None) -> Iterator[str]:
    """Notes that a reader of the numbers needs."""
    for row in outcome.rows:
        where = "" if row.batch is None else f"batch {row.batch}: "
        for reason in row.fusion.fell_back:
            yield f"{where}{reason}"
        if row.cudagraph_skips:
            yield f"{where}CUDA graphs were skipped {row.cudagraph_skips} times: the times are not those of graphs"
    if again := [str(row.batch) for row in outcome.rows[1:] if dynamic and row.new_graph]:
        yield f"another graph was compiled for batch {', '.join(again)}: torch compiles a separate one for a size of 1"
    if any(not row.fusion.sites for row in outcome.rows):
        yield "no all_reduce in the graph, nothing to fuse: tensor parallelism by functional collectives has some"
    elif any(row.fusion.fused < row.fusion.sites for row in outcome.rows):
        yield "not every site was fused: --json has the reports with the reasons, fusion-core explain shows one"
    if outcome.device == "cpu":
        yield "times on a CPU do not predict those on a GPU, where backends with fused kernels come before reference"
    if outcome.left_out:
        left = ", ".join(map(str, outcome.left_out))
        yield f"left out, as --budget {budget:g} had no time for it: " + (f"batch {left}" if left != "None" else "all")


def _batch(row: Row) -> str:
    return "–" if row.batch is None else str(row.batch)


def _strategies(row: Row) -> str:
    found = row.fusion.strategies
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{name} ×{count}" for name, count in found.items()) or "none"


def _difference(row: Row) -> str:
    if row.difference is None:
        return "not compared"
    return f"{row.difference:.4f}" if math.isfinite(row.difference) else "not finite"
