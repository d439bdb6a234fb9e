"""One word of the vocabulary, found in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fusion_core.reason import Reason


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """One application of a word in a graph.

    Attributes:
        word: The word's name.
        operands: The word's parameter → the node whose value it is (behind casts and views that change nothing), a
            scalar, or None.
        results: The word's result names → the nodes that hold them.
        refusal: Why the place must be left alone, where it must.
    """

    word: str
    operands: dict[str, Any]
    results: dict[str, fx.Node]
    refusal: Reason | None = None
