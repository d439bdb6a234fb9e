"""One row of the fault campaign: what is broken, and what must come of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A fault, the verdict that is expected, and the data that its area's `observe` runs it by.

    Attributes:
        area: The module of this folder that runs it.
        name: Unique in its area.
        fault: What is broken, as a phrase.
        expected: A regular expression that the whole observed verdict matches. A verdict begins with one of `OUTCOMES`.
        given: What `observe` is given, as keywords.
        slow: Whether it runs in the whole campaign alone (``make test-faults``).
    """

    area: str
    name: str
    fault: str
    expected: str
    given: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False

    @property
    def id(self) -> str:
        """The row's name in reports of pytest."""
        return f"{self.area}: {self.name}"


OUTCOMES = ("right", "unfused", "refused", "error", "exit")
"""What a verdict may begin with.

- ``right``: the right numbers, fused; ``right: rank 1 unfused`` and the like say more.
- ``unfused``: the right numbers, and a report or a warning says why nothing is fused.
- ``refused``: a plugin, a table or a file is not used, with a reason.
- ``error``: a named exception of this library, or the user's own, handed on.
- ``exit``: the command ended with this status and a sentence.

Whatever else comes of a fault (a hang, a wrong number, a traceback, silence) is a defect of the library.
"""

Observe = Callable[..., str]


def judge(row: Fault, verdict: str) -> None:
    """Raise AssertionError where a verdict is none that the row allows."""
    assert verdict.split(":")[0].split(" ")[0] in OUTCOMES, f"{row.id}: {verdict}"
    assert re.fullmatch(row.expected, verdict, re.DOTALL), f"{row.id}: expected {row.expected!r}, found {verdict!r}"
