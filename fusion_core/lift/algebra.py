"""What a node computes, as a product of powers: one normal form for every spelling of one expression.

``x * rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w``, ``x / sqrt((x * x).sum(-1) / n + eps) * w`` and similar
expressions all become ``x^1 · (mean_square(x) + eps)^(-1/2) · w^1``. Lossless casts, views that keep the last dimension
and waits do not change the product. ``x - x.mean(-1, keepdim=True)`` is one atom, so a LayerNorm is the same product of
that atom, and its variance is the atom's mean square.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of the graph."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a tensor of the graph over the last dimension."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class Centred:
    """A tensor of the graph minus its mean over the last dimension."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class MeanSquare:
    """The mean of squares over the last dimension; of a centred tensor, that is its variance."""

    of: Leaf | Centred


@dataclass(frozen=True, slots=True)
class Plus:
    """The sum of a product and a constant."""

    term: Product
    constant: float


@dataclass(frozen=True, slots=True)
class Biased:
    """The sum of a product and a vector along the last dimension."""

    term: Product
    bias: fx.Node


@dataclass(frozen=True, slots=True)
class Function:
    """A function of a product.

    Attributes:
        name: ``abs``; ``abs_max``, the maximum of magnitudes over the last dimension; ``at_least`` and ``at_most``, a
            bound in ``parameter``; ``log2``; ``ceil``; ``power_of_two_above``; ``one_if_zero``;
            ``spread``, each value repeated ``parameter`` times along the last dimension.
        term: Its argument.
        parameter: Its constant.
    """

    name: str
    term: Product
    parameter: float = 0.0

    @property
    def is_positive(self) -> bool:
        """Whether it has no negative values."""
        if self.name == "at_least" and self.parameter >= 0:
            return True
        return self.name in ("abs", "abs_max", "power_of_two_above")


Atom = Leaf | Mean | Centred | MeanSquare | Plus | Biased | Function


@dataclass(frozen=True, slots=True)
class Product:
    """``coefficient · Π atom^exponent``.

    Attributes:
        factors: Pairs of atom and exponent; no exponent is zero, no atom occurs twice.
        coefficient: The constant factor.
        row: None for a tensor in its own shape. For one value per row, the result of a reduction over the last
            dimension: True if that dimension is kept with size 1, False if it is dropped. After a drop the shape must
            not be mistaken for a vector along the last dimension, whatever its size.
    """

    factors: frozenset[tuple[Atom, float]]
    coefficient: float = 1.0
    row: bool | None = None

    @classmethod
    def of(cls, node: fx.Node) -> Product:
        """A tensor of which nothing more is known."""
        return cls.atom(Leaf(node))

    @classmethod
    def atom(cls, atom: Atom, coefficient: float = 1.0, row: bool | None = None) -> Product:
        """A multiple of an atom."""
        return cls(frozenset({(atom, 1.0)}), coefficient, row)

    @classmethod
    def constant(cls, value: float) -> Product:
        """A number."""
        return cls(frozenset(), float(value))

    @property
    def is_constant(self) -> bool:
        """Whether it is a number."""
        return not self.factors

    @property
    def tensor(self) -> fx.Node | None:
        """The tensor, if it is one, unchanged except for its shape and a wider dtype; else None."""
        return self.multiple if self.coefficient == 1.0 else None

    @property
    def multiple(self) -> fx.Node | None:
        """The tensor, if it is a multiple of one; else None."""
        atom = self.single_factor
        return atom.node if isinstance(atom, Leaf) else None

    @property
    def single_factor(self) -> Atom | None:
        """The atom, if it is one times a coefficient; None for several factors or another power."""
        if len(self.factors) != 1:
            return None
        ((atom, exponent),) = self.factors
        return atom if exponent == 1.0 else None

    def times(self, other: Product, row: bool | None = None) -> Product:
        """The product of both."""
        exponents: dict[Atom, float] = dict(self.factors)
        for atom, exponent in other.factors:
            exponents[atom] = exponents.get(atom, 0.0) + exponent
        return _product(exponents, self.coefficient * other.coefficient, row)

    def power(self, exponent: float) -> Product | None:
        """A real power, or None if the constant factor has no such power."""
        if (
            exponent == 0
            or (self.coefficient <= 0 and exponent != int(exponent))
            or (self.coefficient == 0 and exponent < 0)
        ):
            return None
        exponents = {atom: power * exponent for atom, power in self.factors}
        return _product(exponents, self.coefficient**exponent, self.row)

    def plus(self, constant: float) -> Product:
        """The sum with a constant. The inner coefficient is factored out, so that ``c·m + k`` is ``c · (m + k/c)``."""
        if constant == 0 or self.coefficient == 0:
            return self
        inner, added = Product(self.factors, 1.0, self.row), constant / self.coefficient
        if isinstance(atom := self.single_factor, Plus):
            inner, added = atom.term, atom.constant + added
        if added == 0:
            return Product(inner.factors, self.coefficient, self.row)
        return Product.atom(Plus(inner, added), self.coefficient, self.row)

    def bounded(self, name: str, bound: float) -> Product | None:
        """``at_least`` or ``at_most`` a number, the coefficient factored out; None if that would reverse the bound."""
        if self.coefficient <= 0 or self.is_constant:
            return None
        inner = Product(self.factors, 1.0, self.row)
        return Product.atom(Function(name, inner, bound / self.coefficient), self.coefficient, self.row)

    def absolute(self) -> Product:
        """The magnitude, the coefficient factored out."""
        if isinstance(atom := self.single_factor, Function) and atom.is_positive:
            return Product(self.factors, abs(self.coefficient), self.row)
        inner = Product(self.factors, 1.0, self.row)
        return Product.atom(Function("abs", inner), abs(self.coefficient), self.row)

    def apply(self, name: str) -> Product:
        """A function without constants, applied to the whole product."""
        return Product.atom(Function(name, self), 1.0, self.row)

    def with_row(self, row: bool | None) -> Product:
        """The same value after a view that keeps or drops the reduced dimension."""
        return Product(self.factors, self.coefficient, row)


def _product(exponents: Mapping[Atom, float], coefficient: float, row: bool | None) -> Product:
    plain: dict[Atom, float] = {}
    for atom, power in exponents.items():
        inner: Iterable[tuple[Atom, float]] = ((atom, 1.0),)
        if isinstance(atom, Function) and atom.name == "abs" and power % 2 == 0:  # |x|^2 is x^2
            inner = atom.term.factors
        for part, exponent in inner:
            plain[part] = plain.get(part, 0.0) + exponent * power
    return Product(frozenset((atom, power) for atom, power in plain.items() if power), coefficient, row)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's tensor; empty if its value is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


@functools.cache
def promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """`torch.promote_types`, cached: under the fake mode in which Inductor runs passes, each call takes 0.03 ms."""
    return torch.promote_types(one, other)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's tensor; None if its value is not a tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard on symbolic ones."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imported late: it imports sympy

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
