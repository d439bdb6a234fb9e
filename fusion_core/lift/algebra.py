"""What a node computes, as a product of powers: one normal form for every spelling of one expression.

``x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w``, ``x / sqrt((x * x).sum(-1) / n + eps) * w`` and their like
all become ``x^1 · (mean_square(x) + eps)^(-1/2) · w^1``. Casts that lose nothing, views that keep the last dimension
and waits leave the meaning as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true


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


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a product.

    Attributes:
        name: ``abs``; ``abs_max``, the maximum of magnitudes over the last dimension; ``at_least`` and ``at_most``, a
            bound in ``parameter``; ``log2``; ``ceil``; ``power_of_two_above``; ``one_if_zero``;
            ``spread``, each value repeated ``parameter`` times along the last dimension.
        term: What it is taken of.
        parameter: Its constant.
    """

    name: str
    term: Meaning
    parameter: float = 0.0

    @property
    def is_positive(self) -> bool:
        """Whether it has no negative values."""
        if self.name == "at_least" and self.parameter >= 0:
            return True
        return self.name in ("abs", "abs_max", "power_of_two_above")


Atom = Of | MeanSquare | Plus | Function


@dataclass(frozen=True, slots=True)
class Meaning:
    """``coefficient · Π atom^exponent``.

    Attributes:
        factors: Pairs of atom and exponent; no exponent is zero, no atom comes twice.
        coefficient: The constant factor.
        row: None for a tensor in its own shape. For one value per row, a reduction over the last dimension: True where
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
        return self.multiple if self.coefficient == 1.0 else None

    @property
    def multiple(self) -> fx.Node | None:
        """The tensor that it is a multiple of; None where it is anything else."""
        atom = self.sole
        return atom.node if isinstance(atom, Of) else None

    @property
    def sole(self) -> Atom | None:
        """The atom that it is, but for its coefficient; None where it is a product or another power."""
        if len(self.factors) != 1:
            return None
        ((atom, exponent),) = self.factors
        return atom if exponent == 1.0 else None

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
        inner, added = Meaning(self.factors, 1.0, self.row), constant / self.coefficient
        if isinstance(atom := self.sole, Plus):
            inner, added = atom.term, atom.constant + added
        if added == 0:
            return Meaning(inner.factors, self.coefficient, self.row)
        return Meaning(frozenset({(Plus(inner, added), 1.0)}), self.coefficient, self.row)

    def bounded(self, name: str, bound: float) -> Meaning | None:
        """``at_least`` or ``at_most`` a number, the coefficient drawn out; None where that would turn the bound."""
        if self.coefficient <= 0 or self.is_constant:
            return None
        inner = Meaning(self.factors, 1.0, self.row)
        return Meaning(frozenset({(Function(name, inner, bound / self.coefficient), 1.0)}), self.coefficient, self.row)

    def absolute(self) -> Meaning:
        """The magnitude, the coefficient drawn out."""
        if isinstance(atom := self.sole, Function) and atom.is_positive:
            return Meaning(self.factors, abs(self.coefficient), self.row)
        inner = Meaning(self.factors, 1.0, self.row)
        return Meaning(frozenset({(Function("abs", inner), 1.0)}), abs(self.coefficient), self.row)

    def through(self, name: str) -> Meaning:
        """A function without constants of all of it."""
        return Meaning(frozenset({(Function(name, self), 1.0)}), 1.0, self.row)

    def shaped(self, row: bool | None) -> Meaning:
        """The same value where a view kept or dropped the reduced dimension."""
        return Meaning(self.factors, self.coefficient, row)


def _meaning(exponents: Mapping[Atom, float], coefficient: float, row: bool | None) -> Meaning:
    plain: dict[Atom, float] = {}
    for atom, power in exponents.items():
        inner: Iterable[tuple[Atom, float]] = ((atom, 1.0),)
        if isinstance(atom, Function) and atom.name == "abs" and power % 2 == 0:  # |x|^2 is x^2
            inner = atom.term.factors
        for part, exponent in inner:
            plain[part] = plain.get(part, 0.0) + exponent * power
    return Meaning(frozenset((atom, power) for atom, power in plain.items() if power), coefficient, row)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's tensor; empty for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


@functools.cache
def promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """`torch.promote_types`, for which the fake mode that Inductor runs passes under takes 0.03 ms each time."""
    return torch.promote_types(one, other)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's tensor; None for what is no tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard on symbolic ones."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(_expression(a) == _expression(b)) or statically_known_true(a == b)


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two shapes are known to be equal, without a guard on symbolic sizes."""
    left, right = tuple(a), tuple(b)
    return len(left) == len(right) and all(map(same_size, left, right))


def one_element(node: fx.Node) -> bool:
    """Whether a node's tensor is known to have one element."""
    return isinstance(node.meta.get("val"), torch.Tensor) and all(same_size(size, 1) for size in shape_of(node))
