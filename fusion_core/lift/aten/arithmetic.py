"""Products, powers, and sums with constants; a tensor minus its mean, and the bias of a LayerNorm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import (
    Biased,
    Centred,
    Mean,
    Product,
    dtype_of,
    one_element,
    same_shape,
    same_size,
    shape_of,
)
from fusion_core.lift.norm import is_of_layer_norm, lies_along
from fusion_core.lift.rules import FLOATS, Read, Rule, Rules
from fusion_core.reason import Reason

RULES = Rules()
aten, prims = torch.ops.aten, torch.ops.prims


@RULES.reads(aten.mul.Tensor, aten.mul.Scalar, prims.mul.default)
def _mul(node: fx.Node, read: Read) -> Product | Reason | None:
    operands = [(argument, read(argument)) for argument in node.args[:2]]
    if dtype_of(node) not in FLOATS:
        return None
    if reason := _broadcast(node, operands):
        return reason
    return operands[0][1].times(operands[1][1], _row(node, *operands))


@RULES.reads(aten.div.Tensor, aten.div.Scalar, prims.div.default)
def _div(node: fx.Node, read: Read) -> Product | Reason | None:
    operands = [(argument, read(argument)) for argument in node.args[:2]]
    inverse = operands[1][1].power(-1.0)
    if inverse is None or node.kwargs.get("rounding_mode") or dtype_of(node) not in FLOATS:
        return None
    if reason := _broadcast(node, operands):
        return reason
    return operands[0][1].times(inverse, _row(node, *operands))


@RULES.reads(aten.neg.default, prims.neg.default)
def _neg(node: fx.Node, read: Read) -> Product | None:
    product = read(node.args[0])
    return product.times(Product.constant(-1.0), product.row) if dtype_of(node) in FLOATS else None


@RULES.reads(aten.pow.Tensor_Scalar)
def _pow(node: fx.Node, read: Read) -> Product | None:
    exponent = node.args[1]
    if not isinstance(exponent, int | float) or dtype_of(node) not in FLOATS:
        return None
    return read(node.args[0]).power(float(exponent))


def _power(exponent: float) -> Rule:
    return lambda node, read: read(node.args[0]).power(exponent) if dtype_of(node) in FLOATS else None


RULES.reads(aten.rsqrt.default, prims.rsqrt.default)(_power(-0.5))
RULES.reads(aten.sqrt.default, prims.sqrt.default)(_power(0.5))
RULES.reads(aten.square.default)(_power(2.0))
RULES.reads(aten.reciprocal.default, prims.reciprocal.default)(_power(-1.0))


@RULES.reads(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _add(node: fx.Node, read: Read) -> Product | Reason | None:
    left, right = read(node.args[0]), read(node.args[1])
    scale = node.kwargs.get("alpha", 1)
    if not isinstance(scale, int | float) or dtype_of(node) not in FLOATS:
        return None
    if node.target in (aten.sub.Tensor, aten.sub.Scalar):
        scale = -scale
    if right.is_constant and not left.is_constant and _same_form(node.args[0], node):
        return left.plus(scale * right.coefficient)
    if left.is_constant and not right.is_constant and _same_form(node.args[1], node):
        return right.times(Product.constant(scale), right.row).plus(left.coefficient)
    addends = ((node.args[0], left), (node.args[1], right.times(Product.constant(scale), right.row)))
    if (centred := _centred(node, *addends)) is not None:
        return centred
    for product, other in ((left, node.args[1]), (right, node.args[0])):
        if product.row is not None and isinstance(other, fx.Node) and one_element(other):
            found = f"{other.name}, which {node.name} adds, is known only at run time"
            hint = (
                "dynamic=True, or two models that differ in it, make Dynamo pass it in: "
                "torch._dynamo.config.specialize_float = True keeps it a number"
            )
            return Reason("eps", found, "an epsilon that is a number", hint=hint)
    return _biased(node, *addends) if scale == 1 else None


Addend = tuple[Any, Product]


def _centred(node: fx.Node, *addends: Addend) -> Product | Reason | None:
    """A multiple of a tensor minus its mean."""
    for (whole, product), (operand, row) in (addends, addends[::-1]):
        mean = row.single_factor
        if not isinstance(mean, Mean) or product.multiple is not mean.node or not _same_form(whole, node):
            continue
        if math.isclose(product.coefficient, -row.coefficient, rel_tol=1e-6):
            return _broadcast(node, [(operand, row)]) or Product.atom(Centred(mean.node), product.coefficient)
    return None


def _biased(node: fx.Node, *addends: Addend) -> Product | None:
    """A LayerNorm plus a vector along its last dimension; a tensor of its whole shape is a residual."""
    for (whole, product), (operand, bias) in (addends, addends[::-1]):
        if product.row is not None or not is_of_layer_norm(product) or not _same_form(whole, node):
            continue
        vector = bias.tensor or operand
        if not isinstance(vector, fx.Node) or not lies_along(vector, node):
            continue
        if len(shape_of(vector)) == 1 or not _same_form(vector, node):
            return Product.atom(Biased(product, vector))
    return None


def _same_form(operand: Any, node: fx.Node) -> bool:
    return isinstance(operand, fx.Node) and same_shape(shape_of(operand), shape_of(node))


def _broadcast(node: fx.Node, operands: list[tuple[Any, Product]]) -> Reason | None:
    """The reason if an operand is not broadcast as its product is, else None."""
    for operand, product in operands:
        if not _aligned(operand, product, node):
            shape = ", ".join(map(str, shape_of(operand)))
            found = f"{operand.name}, of shape [{shape}], is broadcast by {node.name}"
            return Reason("factor", found, "a norm's root, one element, or a vector along the last dimension")
    return None


def _aligned(operand: Any, product: Product, out: fx.Node) -> bool:
    """Whether an operand is broadcast as its product is: not at all, per row, or along the last dimension."""
    if not isinstance(operand, fx.Node):
        return True
    shape, target = shape_of(operand), shape_of(out)
    if all(same_size(size, 1) for size in shape):
        return True
    if same_shape(shape, target):
        return True
    if product.row is not None:
        return product.row and len(shape) > 0 and same_size(shape[-1], 1) and _rows_match(shape[:-1], target[:-1])
    return same_size(shape[-1], target[-1]) and all(same_size(size, 1) for size in shape[:-1])


def _rows_match(rows: tuple[Any, ...], target: tuple[Any, ...]) -> bool:
    extra = len(rows) - len(target)
    return (
        extra <= 0
        and same_shape(rows, target[-len(rows) :] if rows else ())
        and all(same_size(s, 1) for s in target[: -extra or 0])
    )


def _row(out: fx.Node, *operands: tuple[Any, Product]) -> bool | None:
    """The ``row`` of a result: that of all operands that are not numbers, or None if they differ."""
    rows = {product.row for operand, product in operands if not product.is_constant}
    return rows.pop() if len(rows) == 1 else None
