"""One word of the vocabulary, found in a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusion_core.reason import Reason


@dataclass(frozen=True, eq=False, slots=True)
class Virtual:
    """A value without a node: one that stays inside a fused operator, or a result without users.

    Attributes:
        node: The operator that computes it.
        name: Its name in messages.
    """

    node: fx.Node
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Addend:
    """A tensor of a sum, times a number.

    Attributes:
        node: The tensor.
        factor: The number.
        is_row: Whether the tensor has the last dimension alone and is added to each row, as a bias is. If not, it has
            the sum's number of elements.
    """

    node: fx.Node
    factor: float = 1.0
    is_row: bool = False

    def __str__(self) -> str:
        return str(self.node) if self.factor == 1.0 else f"{self.factor:g} * {self.node}"


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """A sum without a node: ``b + c`` if a model adds ``(a + b) + c`` and ``a`` is computed last.

    Attributes:
        addends: One or several tensors of one dtype; the first is no row.
        like: A node with the sum's dtype and number of elements.
    """

    addends: tuple[Addend, ...]
    like: fx.Node

    def __str__(self) -> str:
        return " + ".join(map(str, self.addends))


def addends_of(value: object) -> tuple[Addend, ...]:
    """A bound value as a sum: of itself alone, of the tensors of a sum, of none for a scalar."""
    if isinstance(value, Sum):
        return value.addends
    return (Addend(value),) if isinstance(value, fx.Node) else ()


def nodes_of(value: object) -> tuple[fx.Node, ...]:
    """The nodes of a bound value: itself, the operands of a sum, none for a scalar."""
    return tuple(addend.node for addend in addends_of(value))


def held_by(value: object) -> fx.Node | None:
    """The node that has a bound value's shape and dtype; None if the value is not a tensor."""
    node = value.like if isinstance(value, Sum) else value
    return node if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor) else None


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """One application of a word in a graph.

    Attributes:
        word: The word's name.
        operands: The word's parameter → the node with its value (before casts and views that change nothing), a
            `Virtual` value, a `Sum`, a scalar, or None.
        results: The word's result names → their nodes, or `Virtual` values.
        refusal: The reason why the site must not be fused, if there is one.
        duplicates: Further nodes that compute a result → the result's name.
        collectives: Of a word that stands for several collectives, those after the first.
        notes: Facts about the spelling, which become attributes of the site in addition to the pattern's own.
    """

    word: str
    operands: dict[str, Any]
    results: dict[str, fx.Node | Virtual]
    refusal: Reason | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    duplicates: dict[fx.Node, str] = field(default_factory=dict)
    collectives: tuple[fx.Node, ...] = ()
