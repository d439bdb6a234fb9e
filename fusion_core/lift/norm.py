"""Products that are an RMSNorm, and the reasons for near misses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fusion_core.lift.algebra import Atom, Function, Leaf, MeanSquare, Plus, Product, same_size, shape_of
from fusion_core.reason import Reason


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm of a tensor of the graph.

    Attributes:
        base: The tensor.
        whole: The tensor whose mean of squares it takes, if ``base`` is a part of that.
    """

    base: fx.Node
    eps: float
    weight: fx.Node | None
    weight_bias: float
    whole: fx.Node | None = None


def as_norm(
    product: Product, part_of: Callable[[fx.Node], fx.Node | None] = lambda whole: None
) -> Norm | Reason | None:
    """The RMSNorm that a product is; a reason if a root of a mean square makes it a near miss; else None.

    Args:
        product: The product.
        part_of: The tensor that is this rank's part of a tensor that is gathered; None for any other tensor.
    """
    rooted = [(atom, exponent) for atom, exponent in product.factors if root_of(atom) is not None]
    if not rooted or product.row is not None:
        return None
    ((atom, exponent), *more) = rooted
    if more:
        return Reason("root", "two roots of mean squares are multiplied", "one")
    if (parts := _root(atom)) is None:
        return _strange_root(atom)
    root, eps = parts
    if exponent != -0.5:
        return Reason("root", f"a mean of squares is taken to the power {exponent:g}", "the power -0.5 (rsqrt)")
    if eps < 0:
        return Reason("eps", f"the epsilon of the norm of {root.name} is {eps:g}", "0 or more", "eps")
    rest = product.factors - {(atom, exponent)}
    whole = None
    if (Leaf(root), 1.0) not in rest and (part := part_of(root)) is not None and (Leaf(part), 1.0) in rest:
        root, whole = part, root
    if (Leaf(root), 1.0) not in rest:
        others = ", ".join(sorted(f"{a.node.name}^{p:g}" for a, p in rest if isinstance(a, Leaf))) or "no tensor"
        return Reason("root", f"the root is of {root.name} and multiplies {others}", "the root of what it multiplies")
    if not math.isclose(product.coefficient, 1.0, rel_tol=1e-6):
        return Reason("scaled", f"the norm of {root.name} is scaled by {product.coefficient:g}", "the norm as it is")
    weights = rest - {(Leaf(root), 1.0)}
    if not weights:
        return Norm(root, eps, None, 0.0, whole)
    if len(weights) > 1:
        return Reason("weight", f"the norm of {root.name} is multiplied by {len(weights)} factors", "one weight")
    ((factor, exponent),) = weights
    weight, bias = split_weight(factor)
    if weight is None or exponent != 1.0:
        return Reason("weight", f"the norm of {root.name} is multiplied by a function", "a weight of its own", "weight")
    if not _lies_along(weight, root):
        shape = ", ".join(map(str, shape_of(weight)))
        found = f"{weight.name}, which multiplies the norm of {root.name}, has the shape [{shape}]"
        return Reason("weight", found, f"[{shape_of(root)[-1]}]", "weight")
    return Norm(root, eps, weight, bias, whole)


def root_of(atom: Atom) -> fx.Node | None:
    """The tensor whose mean square an atom contains, if there is one."""
    match atom:
        case MeanSquare(node=node):
            return node
        case Plus(term=term) | Function(term=term):
            return next((found for inner, _ in term.factors if (found := root_of(inner)) is not None), None)
    return None


def split_weight(atom: Atom | None) -> tuple[fx.Node | None, float]:
    """The tensor of a weight and the constant that is added to it."""
    match atom:
        case Leaf(node=node):
            return node, 0.0
        case Plus(term=term, constant=constant):
            return term.tensor, constant
    return None, 0.0


def _root(atom: Atom) -> tuple[fx.Node, float] | None:
    """The tensor of a mean square and its epsilon, or None if the atom is something else."""
    match atom:
        case MeanSquare(node=node):
            return node, 0.0
        case Plus(term=Product(coefficient=1.0, single_factor=MeanSquare(node=node)), constant=constant):
            return node, constant
    return None


def _strange_root(atom: Atom) -> Reason:
    match atom:
        case Plus(constant=constant):
            return Reason("eps", f"{constant:g} is added outside the root", "an epsilon inside it")
        case Function(name="at_least", parameter=bound):
            found = f"the mean of squares is bounded below by {bound:g}"
            return Reason("eps", found, "an epsilon that is added to it")
    return Reason("root", "a function is taken of the mean of squares", "its root")


def _lies_along(weight: fx.Node, base: fx.Node) -> bool:
    """Whether ``weight`` has only the last dimension of ``base``."""
    shape = shape_of(weight)
    return bool(shape) and same_size(shape[-1], shape_of(base)[-1]) and all(same_size(size, 1) for size in shape[:-1])
