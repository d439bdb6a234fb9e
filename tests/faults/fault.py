"""One row of the fault campaign: what is broken, and the verdict that must result."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fault:
    """A fault, its expected verdict, and the arguments with which its area's `observe` runs it.

    Attributes:
        area: The module of this folder that runs it.
        name: A name that is unique in its area.
        fault: What is broken, as a phrase.
        expected: A regular expression for the whole observed verdict. A verdict begins with one of `OUTCOMES`.
        given: The keyword arguments of `observe`.
        slow: Whether it runs only in the whole campaign (``make test-faults``).
    """

    area: str
    name: str
    fault: str
    expected: str
    given: Mapping[str, Any] = field(default_factory=dict)
    slow: bool = False

    @property
    def id(self) -> str:
        """The row's name in pytest's output."""
        return f"{self.area}: {self.name}"


OUTCOMES = ("right", "unfused", "refused", "error", "exit")
"""The first word of a verdict.

- ``right``: correct numbers, fused; a suffix such as ``right: rank 1 unfused`` adds detail.
- ``unfused``: correct numbers, and a report or a warning gives the reason why nothing is fused.
- ``refused``: a plugin, a table or a file is not used, with a reason.
- ``error``: a named exception of this library, or the user's own exception, passed on.
- ``exit``: the command ended with this status and one sentence.

Any other outcome of a fault (a hang, a wrong number, a traceback, silence) is a defect of the library.
"""

Observe = Callable[..., str]


def judge(row: Fault, verdict: str) -> None:
    """Raise AssertionError if the row does not allow the verdict."""
    assert verdict.split(":")[0].split(" ")[0] in OUTCOMES, f"{row.id}: {verdict}"
    assert re.fullmatch(row.expected, verdict, re.DOTALL), f"{row.id}: expected {row.expected!r}, found {verdict!r}"
