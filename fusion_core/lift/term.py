"""One word of the vocabulary, found in a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
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
class Sum:
    """A sum that no node holds: ``b + c`` where a model adds ``(a + b) + c``, and ``a`` is what comes last.

    Attributes:
        left: One tensor.
        right: The other, of the same dtype and as many elements.
        like: A node of the sum's dtype and of its shape, or another shape of as many elements.
    """

    left: fx.Node
    right: fx.Node
    like: fx.Node

    def __str__(self) -> str:
        return f"{self.left} + {self.right}"


def nodes_of(value: object) -> tuple[fx.Node, ...]:
    """The nodes that a bound value is computed from: itself, the parts of a sum, none for a scalar."""
    if isinstance(value, Sum):
        return value.left, value.right
    return (value,) if isinstance(value, fx.Node) else ()


def held_by(value: object) -> fx.Node | None:
    """The node that shows a bound value's shape and dtype; None for what is no tensor."""
    node = value.like if isinstance(value, Sum) else value
    return node if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor) else None


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """One application of a word in a graph.

    Attributes:
        word: The word's name.
        operands: The word's parameter → the node whose value it is (behind casts and views that change nothing), an
            `Unheld` value, a `Sum`, a scalar, or None.
        results: The word's result names → the nodes that hold them, or `Unheld` where none does.
        refusal: Why the place must be left alone, where it must.
        twins: Nodes that compute a result once more → which.
        notes: Facts about the spelling that a site carries among its attributes, beside the pattern's own.
    """

    word: str
    operands: dict[str, Any]
    results: dict[str, fx.Node | Unheld]
    refusal: Reason | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    twins: dict[fx.Node, str] = field(default_factory=dict)
