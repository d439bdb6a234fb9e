"""Magnitudes, bounds and powers of two: the operations of quantisation on values and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Function, Product, dtype_of, same_shape, shape_of
from fusion_core.lift.rules import FLOATS, Read, Rules
from fusion_core.reason import Reason

RULES = Rules()
aten, prims = torch.ops.aten, torch.ops.prims


@RULES.reads(aten.abs.default)
def _abs(node: fx.Node, read: Read) -> Product | None:
    return read(node.args[0]).absolute() if dtype_of(node) in FLOATS else None


@RULES.reads(
    aten.clamp_min.default, aten.clamp_max.default, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
    aten.maximum.default, aten.minimum.default,
)  # fmt: skip
def _bound(node: fx.Node, read: Read) -> Product | None:
    name = "at_least" if node.target in _MAXIMA else "at_most"
    for operand, bound in (node.args[:2], node.args[1::-1]):
        product, limit = read(operand), read(bound)
        if limit.is_constant and not product.is_constant and _same_form(operand, node):
            return product.bounded(name, limit.coefficient)
    return None


_MAXIMA = (aten.clamp_min.default, aten.clamp_min.Tensor, aten.maximum.default)


@RULES.reads(aten.clamp.default)
def _clamp(node: fx.Node, read: Read) -> Product | None:
    product: Product | None = read(node.args[0])
    bounds = (*node.args[1:], *([None] * (3 - len(node.args))))
    for name, keyword, bound in zip(("at_least", "at_most"), ("min", "max"), bounds, strict=True):
        limit = node.kwargs.get(keyword, bound)
        if limit is None:
            continue
        if product is None or not isinstance(limit, int | float):
            return None
        product = product.bounded(name, float(limit))
    return product if dtype_of(node) in FLOATS else None


@RULES.reads(aten.log2.default)
def _log2(node: fx.Node, read: Read) -> Product | None:
    return read(node.args[0]).apply("log2") if dtype_of(node) in FLOATS else None


@RULES.reads(aten.ceil.default)
def _ceil(node: fx.Node, read: Read) -> Product | None:
    return read(node.args[0]).apply("ceil") if dtype_of(node) in FLOATS else None


@RULES.reads(aten.floor.default, aten.round.default)
def _rounding(node: fx.Node, read: Read) -> Reason:
    return Reason("rounding", f"{node.name} rounds to whole numbers by {node.target}", "FP8 codes, and ceil for scales")


@RULES.reads(aten.exp2.default)
def _exp2(node: fx.Node, read: Read) -> Product | None:
    return _power_of_two(read(node.args[0]))


@RULES.reads(aten.pow.Scalar)
def _pow_of_number(node: fx.Node, read: Read) -> Product | None:
    return _power_of_two(read(node.args[1])) if node.args[0] == 2 else None


def _power_of_two(exponent: Product) -> Product | None:
    """``2**ceil(log2(t))``: ``t`` rounded up to a power of two."""
    if exponent.coefficient != 1.0 or not isinstance(ceil := exponent.single_factor, Function) or ceil.name != "ceil":
        return None
    if ceil.term.coefficient != 1.0 or not isinstance(log2 := ceil.term.single_factor, Function) or log2.name != "log2":
        return None
    return log2.term.apply("power_of_two_above")


@RULES.reads(aten.where.self)
def _where(node: fx.Node, read: Read) -> Product | None:
    """``where(t == 0, 1, t)``, and the same with ``t`` below any normal number."""
    condition, one, other = node.args
    if not isinstance(condition, fx.Node) or condition.target not in _SMALL or not _same_form(other, node):
        return None
    product, limit = read(other), read(condition.args[1])
    fits = read(condition.args[0]) == product and read(one) == Product.constant(1.0)
    if not fits or not limit.is_constant or not 0 <= limit.coefficient <= _SMALLEST_NORMAL or product.is_constant:
        return None
    return product.apply("one_if_zero")


_SMALL = (aten.eq.Scalar, aten.le.Scalar, aten.lt.Scalar)
_SMALLEST_NORMAL = 2.0**-126


def _same_form(operand: Any, node: fx.Node) -> bool:
    """Whether an operand is not broadcast."""
    if not isinstance(operand, fx.Node) or dtype_of(node) not in FLOATS:
        return False
    return same_shape(shape_of(operand), shape_of(node))
