"""How many graphs of a model each compiled graph stands for: vLLM compiles equal ones once."""

from __future__ import annotations

from typing import Any

from fusion_core import Report

_counts: dict[int, tuple[Report, int]] = {}
"""By the report's identity; the report itself is kept, so that no other one has it."""


class Graphs:
    """The graphs that one of vLLM's compiler managers returned."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Report]] = {}

    def returned(self, compiled: Any, new: Report | None) -> Report | None:
        """Note that a graph of the model runs `compiled`.

        Args:
            compiled: What vLLM runs for it: the same object for equal graphs.
            new: The report that its compilation made; None if it made none.

        Returns:
            The report whose count changed by this; None for a new report, and for a graph without one.
        """
        if new is not None:
            self._known[id(compiled)] = compiled, new
            return None
        _, report = self._known.get(id(compiled), (None, None))
        if report is not None:
            _counts[id(report)] = report, count_of(report) + 1
        return report


def count_of(report: Report) -> int:
    """How many of the model's graphs are the one that a report of this process is about."""
    return _counts.get(id(report), (report, 1))[1]
