"""What a node computes, as a product of powers: one normal form for every spelling of one expression.

``x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w``, ``x / sqrt((x * x).sum(-1) / n + eps) * w`` and their like
all become ``x^1 · (mean_square(x) + eps)^(-1/2) · w^1``. Casts that lose nothing, views that keep the last dimension
and waits leave the meaning as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True, slots=True)
class Of:
    """A tensor of the graph as it is."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class MeanSquare:
    """The mean over the last dimension of the squares of a tensor of the graph."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class Plus:
    """A product and a constant, added."""

    term: Meaning
    constant: float


Atom = Of | MeanSquare | Plus


@dataclass(frozen=True, slots=True)
class Meaning:
    """``coefficient · Π atom^exponent``.

    Attributes:
        factors: Pairs of atom and exponent; no exponent is zero, no atom comes twice.
        coefficient: The constant factor.
        row: None for a tensor in its own shape. For one value per row, a mean over the last dimension: True where
            that dimension is kept with size 1, False where it is dropped. A dropped one must not be mistaken for a
            vector along the last dimension, whatever its size.
    """

    factors: frozenset[tuple[Atom, float]]
    coefficient: float = 1.0
    row: bool | None = None

    @classmethod
    def of(cls, node: fx.Node) -> Meaning:
        """A tensor about which nothing more is known."""
        return cls(frozenset({(Of(node), 1.0)}))

    @classmethod
    def constant(cls, value: float) -> Meaning:
        """A number."""
        return cls(frozenset(), float(value))

    @property
    def is_constant(self) -> bool:
        """Whether it is a number."""
        return not self.factors

    @property
    def tensor(self) -> fx.Node | None:
        """The tensor that it is, unchanged but for its shape and a wider dtype; None where it is anything else."""
        if self.coefficient != 1.0 or len(self.factors) != 1:
            return None
        ((atom, exponent),) = self.factors
        return atom.node if isinstance(atom, Of) and exponent == 1.0 else None

    def times(self, other: Meaning, row: bool | None = None) -> Meaning:
        """The product of both."""
        exponents: dict[Atom, float] = dict(self.factors)
        for atom, exponent in other.factors:
            exponents[atom] = exponents.get(atom, 0.0) + exponent
        return _meaning(exponents, self.coefficient * other.coefficient, row)

    def power(self, exponent: float) -> Meaning | None:
        """A real power; None where the constant factor has no such power."""
        if (
            exponent == 0
            or (self.coefficient <= 0 and exponent != int(exponent))
            or (self.coefficient == 0 and exponent < 0)
        ):
            return None
        exponents = {atom: power * exponent for atom, power in self.factors}
        return _meaning(exponents, self.coefficient**exponent, self.row)

    def plus(self, constant: float) -> Meaning:
        """A constant added. The inner coefficient is drawn out, so that ``c·m + k`` is ``c · (m + k/c)``."""
        if constant == 0 or self.coefficient == 0:
            return self
        inner = Meaning(self.factors, 1.0, self.row)
        return Meaning(frozenset({(Plus(inner, constant / self.coefficient), 1.0)}), self.coefficient, self.row)

    def shaped(self, row: bool | None) -> Meaning:
        """The same value where a view kept or dropped the reduced dimension."""
        return Meaning(self.factors, self.coefficient, row)


def _meaning(exponents: Mapping[Atom, float], coefficient: float, row: bool | None) -> Meaning:
    return Meaning(frozenset((atom, power) for atom, power in exponents.items() if power), coefficient, row)


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm of a tensor of the graph."""

    base: fx.Node
    eps: float
    weight: fx.Node | None
    weight_bias: float


def as_norm(meaning: Meaning) -> Norm | None:
    """The RMSNorm that a product is; None where it is none."""
    root = base = None
    eps = 0.0
    rest: list[tuple[Atom, float]] = []
    for atom, exponent in meaning.factors:
        match atom, exponent:
            case Plus(term=Meaning() as term, constant=constant), -0.5 if (node := _mean_square(term)) is not None:
                root, eps = node, constant
            case MeanSquare(node=node), -0.5:
                root = node
            case _:
                rest.append((atom, exponent))
    if root is None or not math.isclose(meaning.coefficient, 1.0, rel_tol=1e-6):
        return None
    weights = []
    for atom, exponent in rest:
        if isinstance(atom, Of) and atom.node is root and exponent == 1.0 and base is None:
            base = root
        else:
            weights.append((atom, exponent))
    if base is None or len(weights) > 1:
        return None
    if not weights:
        return Norm(base, eps, None, 0.0)
    ((atom, exponent),) = weights
    weight, bias = _weight(atom)
    if exponent != 1.0 or weight is None or not _is_weight(weight, base):
        return None
    return Norm(base, eps, weight, bias)


def _mean_square(term: Meaning) -> fx.Node | None:
    if term.coefficient != 1.0 or len(term.factors) != 1:
        return None
    ((atom, exponent),) = term.factors
    return atom.node if isinstance(atom, MeanSquare) and exponent == 1.0 else None


def _weight(atom: Atom) -> tuple[fx.Node | None, float]:
    match atom:
        case Of(node=node):
            return node, 0.0
        case Plus(term=term, constant=constant):
            return term.tensor, constant
        case _:
            return None, 0.0


def _is_weight(weight: fx.Node, base: fx.Node) -> bool:
    """Whether ``weight`` lies along the last dimension of ``base`` alone."""
    shape = shape_of(weight)
    return bool(shape) and same_size(shape[-1], shape_of(base)[-1]) and all(same_size(size, 1) for size in shape[:-1])


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's tensor; empty for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's tensor; None for what is no tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard on symbolic ones."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(_expression(a) == _expression(b))


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes are known to be equal, without a guard on symbolic sizes."""
    left, right = tuple(a), tuple(b)
    return len(left) == len(right) and all(map(same_size, left, right))
