"""The reports of this process, oldest first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fusion_core.config import KEPT
from fusion_core.report.report import Report

_reports: list[Report] = []
_lock = threading.Lock()
_listener = threading.local()


def record(report: Report, most: int = KEPT) -> None:
    """Keep a report, and at most the newest ``most``; also pass it to this thread's surrounding `collecting` blocks."""
    with _lock:
        _reports.append(report)
        del _reports[:-most]
    for collected, then in getattr(_listener, "stack", ()):
        collected.append(report)
        then(report)


@contextmanager
def collecting(then: Callable[[Report], object] = lambda report: None) -> Iterator[list[Report]]:
    """The reports that this thread records while the block runs; ``then`` is called with each one."""
    collected: list[Report] = []
    stack = _listener.__dict__.setdefault("stack", [])
    stack.append((collected, then))
    try:
        yield collected
    finally:
        stack.pop()


def reports() -> tuple[Report, ...]:
    """The reports of the graphs compiled in this process, oldest first: the newest `FusionConfig.reports` of them."""
    with _lock:
        return tuple(_reports)


def last_report() -> Report | None:
    """The report of the newest graph compiled in this process, or None if there is none."""
    with _lock:
        return _reports[-1] if _reports else None
