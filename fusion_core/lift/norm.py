"""Products that are an RMSNorm or a LayerNorm, and the reasons for near misses.

A LayerNorm is the RMSNorm of a tensor minus its mean, plus a bias.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from fusion_core.lift.algebra import (
    Atom,
    Biased,
    Centred,
    Function,
    Leaf,
    Mean,
    MeanSquare,
    Plus,
    Product,
    same_size,
    shape_of,
)
from fusion_core.reason import Reason


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm or a LayerNorm of a tensor of the graph.

    Attributes:
        base: The tensor.
        whole: The tensor whose mean of squares it takes, if ``base`` is a part of that.
        centred: Whether it is a LayerNorm.
        bias: Added to a LayerNorm.
    """

    base: fx.Node
    eps: float
    weight: fx.Node | None
    weight_bias: float
    whole: fx.Node | None = None
    centred: bool = False
    bias: fx.Node | None = None

    @property
    def word(self) -> str:
        """The word of the vocabulary."""
        return "layer_norm" if self.centred else "rms_norm"


def as_norm(
    product: Product, part_of: Callable[[fx.Node], fx.Node | None] = lambda whole: None
) -> Norm | Reason | None:
    """The norm that a product is; a reason if a root of a mean square makes it a near miss; else None.

    Args:
        product: The product.
        part_of: The tensor that is this rank's part of a tensor that is gathered; None for any other tensor.
    """
    if isinstance(sum_ := product.single_factor, Biased) and product.coefficient == 1.0:
        norm = as_norm(sum_.term)
        return replace(norm, bias=sum_.bias) if isinstance(norm, Norm) else norm
    rooted = [(atom, exponent) for atom, exponent in product.factors if root_of(atom) is not None]
    if not rooted or product.row is not None:
        return None
    ((atom, exponent), *more) = rooted
    if more:
        return Reason("root", "two roots of mean squares are multiplied", "one")
    if (parts := _root(atom)) is None:
        return _strange_root(atom)
    root, eps = parts
    base = root.node
    if exponent != -0.5:
        return Reason("root", f"a mean of squares is taken to the power {exponent:g}", "the power -0.5 (rsqrt)")
    if eps < 0:
        return Reason("eps", f"the epsilon of the norm of {base.name} is {eps:g}", "0 or more", "eps")
    rest = product.factors - {(atom, exponent)}
    whole = None
    if isinstance(root, Leaf) and (root, 1.0) not in rest:
        part = part_of(base)
        if part is not None and (Leaf(part), 1.0) in rest:
            root, base, whole = Leaf(part), part, base
    if (root, 1.0) not in rest:
        others = ", ".join(sorted(f"{a.node.name}^{p:g}" for a, p in rest if isinstance(a, Leaf))) or "no tensor"
        of = f"{base.name} minus its mean" if isinstance(root, Centred) else base.name
        return Reason("root", f"the root is of {of} and multiplies {others}", "the root of what it multiplies")
    if not math.isclose(product.coefficient, 1.0, rel_tol=1e-6):
        return Reason("scaled", f"the norm of {base.name} is scaled by {product.coefficient:g}", "the norm as it is")
    norm = Norm(base, eps, None, 0.0, whole, centred=isinstance(root, Centred))
    weights = rest - {(root, 1.0)}
    if not weights:
        return norm
    if len(weights) > 1:
        return Reason("weight", f"the norm of {base.name} is multiplied by {len(weights)} factors", "one weight")
    ((factor, exponent),) = weights
    weight, bias = split_weight(factor)
    if weight is None or exponent != 1.0:
        return Reason("weight", f"the norm of {base.name} is multiplied by a function", "a weight of its own", "weight")
    if not lies_along(weight, base):
        shape = ", ".join(map(str, shape_of(weight)))
        found = f"{weight.name}, which multiplies the norm of {base.name}, has the shape [{shape}]"
        return Reason("weight", found, f"[{shape_of(base)[-1]}]", "weight")
    return replace(norm, weight=weight, weight_bias=bias)


def root_of(atom: Atom) -> Leaf | Centred | None:
    """The tensor whose mean square an atom contains, as it is or minus its mean, if there is one."""
    match atom:
        case MeanSquare(of=base):
            return base
        case Plus(term=term) | Function(term=term):
            return next((found for inner, _ in term.factors if (found := root_of(inner)) is not None), None)
    return None


def is_of_layer_norm(product: Product) -> bool:
    """Whether a product has a tensor minus its mean, or a function of its variance, among its factors."""
    return any(isinstance(atom, Centred) or isinstance(root_of(atom), Centred) for atom, _ in product.factors)


def as_layer_norm_takes_it(node: fx.Node, product: Product) -> Reason | None:
    """The reason why a mean of values, or a variance, is no mean of squares; None for any other product."""
    atom = product.single_factor if math.isclose(product.coefficient, 1.0, rel_tol=1e-6) else None
    name = node.args[0] if node.target is operator.getitem else node
    if isinstance(atom, Mean):
        return Reason("mean", f"{name} is a mean of the values themselves, as LayerNorm takes it", "a mean of squares")
    if isinstance(atom, MeanSquare) and isinstance(atom.of, Centred):
        return Reason("mean", f"{name} is a variance about the mean, as LayerNorm takes it", "a mean of squares")
    return None


def split_weight(atom: Atom | None) -> tuple[fx.Node | None, float]:
    """The tensor of a weight and the constant that is added to it."""
    match atom:
        case Leaf(node=node):
            return node, 0.0
        case Plus(term=term, constant=constant):
            return term.tensor, constant
    return None, 0.0


def _root(atom: Atom) -> tuple[Leaf | Centred, float] | None:
    """What a mean square is of, and its epsilon; None if the atom is something else."""
    match atom:
        case MeanSquare(of=base):
            return base, 0.0
        case Plus(term=Product(coefficient=1.0, single_factor=MeanSquare(of=base)), constant=constant):
            return base, constant
    return None


def _strange_root(atom: Atom) -> Reason:
    match atom:
        case Plus(constant=constant):
            return Reason("eps", f"{constant:g} is added outside the root", "an epsilon inside it")
        case Function(name="at_least", parameter=bound):
            found = f"the mean of squares is bounded below by {bound:g}"
            return Reason("eps", found, "an epsilon that is added to it")
    return Reason("root", "a function is taken of the mean of squares", "its root")


def lies_along(vector: fx.Node, base: fx.Node) -> bool:
    """Whether a tensor has only the last dimension of ``base``."""
    shape = shape_of(vector)
    return bool(shape) and same_size(shape[-1], shape_of(base)[-1]) and all(same_size(size, 1) for size in shape[:-1])
