"""One word of the vocabulary, found in a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fusion_core.reason import Reason


@dataclass(frozen=True, eq=False, slots=True)
class Unheld:
    """A value that no node of the graph holds: what one operator hands on inside itself, or a result without users.

    Attributes:
        node: The operator that computes it.
        name: What messages call it.
    """

    node: fx.Node
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """One application of a word in a graph.

    Attributes:
        word: The word's name.
        operands: The word's parameter → the node whose value it is (behind casts and views that change nothing), an
            `Unheld` value, a scalar, or None.
        results: The word's result names → the nodes that hold them, or `Unheld` where none does.
        refusal: Why the place must be left alone, where it must.
        notes: Facts about the spelling that a site carries among its attributes, beside the pattern's own.
    """

    word: str
    operands: dict[str, Any]
    results: dict[str, fx.Node | Unheld]
    refusal: Reason | None = None
    notes: dict[str, Any] = field(default_factory=dict)
