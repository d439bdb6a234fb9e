"""Reductions over the last dimension: means, mean squares and variances, and maxima of magnitudes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fusion_core.lift.algebra import Centred, Function, Leaf, Mean, MeanSquare, Product, dtype_of, one_element, shape_of
from fusion_core.lift.rules import FLOATS, Read, Rules
from fusion_core.reason import Reason

RULES = Rules()
aten = torch.ops.aten


@RULES.reads(aten.mean.dim, aten.mean.default)
def _mean(node: fx.Node, read: Read) -> Product | Reason | None:
    return _elsewhere(node, "mean") or _moment(node, node, read, 1.0)


@RULES.reads(aten.sum.dim_IntList)
def _sum(node: fx.Node, read: Read) -> Product | Reason | None:
    size = shape_of(node.args[0])[-1:] if isinstance(node.args[0], fx.Node) else ()
    if not size or not isinstance(size[0], int) or _elsewhere(node, "sum"):
        return None
    product = _moment(node, node, read, float(size[0]))
    return product if isinstance(product, Product) else None  # most sums are no norm: report no near miss


@RULES.reads(aten.var.correction)
def _var(node: fx.Node, read: Read) -> Product | Reason | None:
    return _variance(node, node, read)


def _moment(node: fx.Node, reduction: fx.Node, read: Read, count: float) -> Product | Reason | None:
    """A mean of values or of their squares, times ``count``."""
    product = read(reduction.args[0])
    if dtype_of(node) not in FLOATS or product.row is not None:
        return None
    if len(product.factors) != 1:
        scale = next((a.node for a, _ in product.factors if isinstance(a, Leaf) and one_element(a.node)), None)
        if scale is None:
            return None
        found = f"{node.name} is a mean of squares of what is scaled by {scale.name}"
        return Reason("scaled", found, "the sum as it is")
    ((atom, exponent),) = product.factors
    if isinstance(atom, Function) and atom.name == "abs" and exponent == 1:
        return Reason("mean", f"{node.name} is a mean of |x|", "a mean of squares")
    if isinstance(atom, Leaf) and exponent == 1:
        return Product.atom(Mean(atom.node), count * product.coefficient, _keeps(reduction))
    if isinstance(atom, Leaf | Centred) and exponent == 2:
        if product.coefficient not in (1.0, 1.0 / count):
            found = f"{node.name} is a mean of squares of {atom.node} scaled by {abs(product.coefficient) ** 0.5:g}"
            return Reason("scaled", found, "the sum as it is")
        return Product.atom(MeanSquare(atom), count * product.coefficient, _keeps(reduction))
    if isinstance(atom, Leaf) or (isinstance(atom, Function) and atom.name == "abs"):
        return Reason("mean", f"{node.name} is a mean of powers of {exponent:g}", "a mean of squares")
    return None


def _variance(node: fx.Node, reduction: fx.Node, read: Read) -> Product | Reason | None:
    """A variance: the mean of squares of a tensor minus its mean."""
    correction = reduction.kwargs.get("correction", 1)
    if reason := _elsewhere(reduction, "variance about the mean"):
        return reason
    if correction != 0:
        divisor = "n - 1" if correction in (1, None) else f"n - {correction}"
        return Reason("variance", f"{reduction.name} is a variance that divides by {divisor}", "one that divides by n")
    product = read(reduction.args[0])
    if dtype_of(node) not in FLOATS or product.row is not None or product.multiple is None:
        return None
    if product.coefficient != 1.0:
        found = f"{reduction.name} is a variance of {product.multiple} scaled by {product.coefficient:g}"
        return Reason("variance", found, "the sum as it is")
    return Product.atom(MeanSquare(Centred(product.multiple)), row=_keeps(reduction))


@RULES.reads(aten.amax.default, aten.max.default)
def _amax(node: fx.Node, read: Read) -> Product | Reason | None:
    return _elsewhere(node, "maximum") or _maximum(node, node, read)


@RULES.reads(operator.getitem)
def _part(node: fx.Node, read: Read) -> Product | Reason | None:
    whole, index = node.args
    if not isinstance(whole, fx.Node):
        return None
    if whole.target is aten.var_mean.correction:
        variance = _variance(node, whole, read)
        return _moment(node, whole, read, 1.0) if index == 1 and not _elsewhere(whole, "mean") else variance
    if whole.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        return Reason("part", f"{node.name} is a part of {whole.args[0]}", "the whole")
    if whole.target is aten.max.dim and index == 0:
        return _elsewhere(whole, "maximum") or _maximum(node, whole, read)
    return None


def _maximum(node: fx.Node, reduction: fx.Node, read: Read) -> Product | Reason | None:
    product = read(reduction.args[0])
    if dtype_of(node) not in FLOATS or product.row is not None or product.coefficient <= 0:
        return None
    atom = product.single_factor
    if not isinstance(atom, Function) or atom.name != "abs":
        of = "the values themselves" if product.multiple is not None else "a function of the values"
        return Reason("maximum", f"{node.name} is a maximum of {of}", "one of their magnitudes")
    return Product.atom(Function("abs_max", atom.term), product.coefficient, _keeps(reduction))


def _elsewhere(node: fx.Node, name: str) -> Reason | None:
    """The reason if a reduction is not over the last dimension only, else None."""
    operand, dims = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    assert isinstance(operand, fx.Node)
    last = len(shape_of(operand)) - 1
    if isinstance(dims, int):
        dims = [dims]
    all_of_them = isinstance(dims, list | tuple) and len(dims) == last + 1 > 1
    if not dims or all_of_them or not isinstance(dims, list | tuple):
        found = f"{node.name} is a {name} over the whole tensor {operand.name}"
        return Reason("reduction", found, "one over the last dimension")
    if tuple(dims) in ((-1,), (last,)):
        return None
    text = " and ".join(str(d % (last + 1)) if isinstance(d, int) else str(d) for d in dims)
    plural = "s" if len(dims) > 1 else ""
    return Reason("reduction", f"{node.name} is a {name} over dimension{plural} {text} of {last + 1}", "the last one")


def _keeps(node: fx.Node) -> bool:
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
