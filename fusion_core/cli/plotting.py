"""Plots of measurements: bars as text for a terminal, curves as SVG if matplotlib is installed."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_core._files import write_whole
from fusion_core.errors import ConfigError

_LEAST_SPAN = 0.1
"""The least range of the bars, as a share of the base: noise of one percent must not fill the screen."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of `bars`.

    Attributes:
        label: The text on its left.
        value: Where the bar ends.
        low: The lowest reading.
        high: The highest reading.
        text: The text on its right.
    """

    label: str
    value: float
    low: float
    high: float
    text: str


def bars(rows: Sequence[Bar], base: float, *, ascii_only: bool, width: int = 60) -> str:
    """Bars that start at a base line: to the right for values above it, to the left for values below it.

    A bar ends at its value. It is solid as far as every single reading reached, and shaded over the range of the
    readings: darker within the bar, lighter beyond it.

    Args:
        rows: The bars from top to bottom.
        base: The value at which bars start.
        ascii_only: Draw with ``#``, ``=``, ``-`` and ``|`` instead of block characters.
        width: Columns of the drawing, without labels and texts.

    Example:
        >>> rows = [Bar("8", 1.2, 1.1, 1.3, "1.20x"), Bar("32", 0.9, 0.9, 1.0, "0.90x")]
        >>> print(bars(rows, 1.0, ascii_only=True, width=17))
         8      |####====----  1.20x
        32  ====|              0.90x
    """
    if not rows:
        return ""
    solid, dark, light, line = "#=-|" if ascii_only else "█▓▒│"
    low = min(base, *(min(row.low, row.value) for row in rows))
    high = max(base, *(max(row.high, row.value) for row in rows))
    span = max(high - low, _LEAST_SPAN * base)

    def column(value: float) -> int:
        return round((value - low) / span * (width - 1))

    zero, last = column(base), column(high) if high > base else column(base)
    labels = max(len(row.label) for row in rows)
    lines = []
    for row in rows:
        cells = [" "] * (last + 1)
        sure = row.low if row.value > base else row.high
        for start, end, mark in ((row.low, row.high, light), (base, row.value, dark), (base, sure, solid)):
            if mark == solid and (sure - base) * (row.value - base) <= 0:
                continue  # some readings are on the other side of the base
            for each in range(min(column(start), column(end)), max(column(start), column(end)) + 1):
                cells[each] = mark if column(start) != column(end) else cells[each]
        cells[zero] = line
        lines.append(f"{row.label:>{labels}}  {''.join(cells)}  {row.text}".rstrip())
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of a `Panel`.

    Attributes:
        label: Its name in the legend.
        points: ``(x, y)``.
        ranges: ``(least, most)`` at each point, drawn as error bars; empty for none.
    """

    label: str
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """A pair of axes.

    Attributes:
        title: The title above it.
        x_label: The label of the horizontal axis, which is logarithmic to base 2, for batch sizes and token counts.
        y_label: The label of the vertical axis.
        lines: The curves.
        base: The height of a thin horizontal line; None for none.
        log_y: Whether the vertical axis is logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    base: float | None = None
    log_y: bool = False


def check_can_save(path: Path) -> None:
    """Raise `ConfigError` if `save` could not write there; for use before a long measurement."""
    if path.suffix != ".svg":
        raise ConfigError(f"--plot is {str(path)!r}, needs a file name that ends in .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("matplotlib is not installed, needs the plot extra; pip install 'fusion-core[plot]'")
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--plot is {str(path)!r}, in a folder that does not exist")


def save(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write panels side by side to one SVG file, atomically. The same numbers give the same bytes.

    Raises:
        ConfigError: if the file cannot be written.
    """
    check_can_save(path)
    try:
        write_whole(path, svg(title, panels))
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from error


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Panels side by side, as the text of an SVG file."""
    matplotlib: Any = importlib.import_module("matplotlib")  # untyped, so that mypy does not need it
    figures: Any = importlib.import_module("matplotlib.figure")  # not pyplot, which has global state
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fusion_core", "svg.fonttype": "none"}):
        figure = figures.Figure(figsize=(max(5.5, 4.5 * len(panels)), 3.8), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw(axis, panel)
        axes[0].set_ylabel(panels[0].y_label)
        if len({line.label for panel in panels for line in panel.lines}) > 1:
            axes[0].legend(fontsize=8)
        figure.suptitle(title, fontsize=10)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


MOST_LEVEL = 8
"""The most axis labels that are drawn horizontally; more would overlap."""


def _draw(axis: Any, panel: Panel) -> None:
    if panel.base is not None:
        axis.axhline(panel.base, color="black", linewidth=0.8)
    for line in panel.lines:
        xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
        errors = None
        if line.ranges:
            pairs = list(zip(ys, line.ranges, strict=True))
            errors = [[y - min(low, y) for y, (low, _) in pairs], [max(high, y) - y for y, (_, high) in pairs]]
        axis.errorbar(xs, ys, yerr=errors, label=line.label, marker="o", markersize=4, capsize=3)
    axis.set_xscale("log", base=2)
    if panel.log_y:
        axis.set_yscale("log")
    marks = sorted({x for line in panel.lines for x, _ in line.points})
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.set_xticks([], minor=True)
    if len(marks) > MOST_LEVEL:
        axis.tick_params(axis="x", labelrotation=60, labelsize=7)
    axis.set_xlabel(panel.x_label)
    axis.set_title(panel.title, fontsize=9)
    axis.grid(alpha=0.3)
