"""Views: other shapes of the same values, and slices of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Function, Product, same_shape, same_size, shape_of
from fusion_core.lift.rules import Read, Rules
from fusion_core.reason import Reason

RULES = Rules()
aten = torch.ops.aten

RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default,
)  # fmt: skip
"""Operators whose result has all values of their argument, in the same order."""


@RULES.reads(*RESHAPES)
def _reshape(node: fx.Node, read: Read) -> Product | Reason | None:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    before, after = shape_of(operand), shape_of(node)
    product = read(operand)
    if same_shape(before, after):
        return product
    if product.row is None:
        if not before or not after:
            return product if product.is_constant or all(same_size(size, 1) for size in (*before, *after)) else None
        if same_size(before[-1], after[-1]):
            return product
        found = f"{node.name} splits or joins the last dimension of {operand.name}: {before[-1]} becomes {after[-1]}"
        return Reason("heads", found, "the last dimension as it is")
    if after and same_size(after[-1], 1):  # one value per row; restores the dimension if it was dropped
        return product.with_row(True)
    if not product.row or not before:
        return None
    if _joins(before, after):  # a value per group of neighbours, repeated over the group
        return Product.atom(Function("spread", product, float(before[-1])))
    return product.with_row(False) if same_shape(before[:-1], after) else None


@RULES.reads(aten.permute.default, aten.transpose.int)
def _permute(node: fx.Node, read: Read) -> Product | None:
    """One that moves dimensions of size 1 alone is a reshape: the values keep their order."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    before = shape_of(operand)
    order = list(range(len(before)))
    if node.target is aten.transpose.int:
        one, other = node.args[1:3]
        if not isinstance(one, int) or not isinstance(other, int) or not before:
            return None
        order[one], order[other] = order[other], order[one]
    elif isinstance(node.args[1], list | tuple) and all(isinstance(dim, int) for dim in node.args[1]):
        order = [order[dim] for dim in node.args[1]]  # type: ignore[index]
    moved = [dim for dim in order if not same_size(before[dim], 1)]
    product = _reshape(node, read) if moved == sorted(moved) else None
    return product if isinstance(product, Product) else None


def _joins(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether the last dimensions are joined without splitting a row."""
    if not after or not isinstance(before[-1], int) or not isinstance(after[-1], int) or before[-1] <= 1:
        return False
    return after[-1] > before[-1] and after[-1] % before[-1] == 0


@RULES.reads(aten.expand.default)
def _expand(node: fx.Node, read: Read) -> Product | None:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    before, after = shape_of(operand), shape_of(node)
    product = read(operand)
    if product.is_constant or same_shape(before, after):
        return product
    added = len(after) - len(before)
    if same_shape(before, after[added:]) and all(same_size(size, 1) for size in after[:added]):
        reshaped = _reshape(node, read)
        return reshaped if isinstance(reshaped, Product) else None
    if product.row is not None:  # one value per row, along the row
        return product if product.row and same_shape(before[:-1], after[:-1]) else None
    if all(same_size(size, 1) for size in before):
        return product if product.multiple is not None else None  # one number for all
    along = bool(before) and same_size(before[-1], after[-1]) and all(same_size(size, 1) for size in before[:-1])
    # a vector along the last dimension, for every row; only for a tensor itself, not a product of it
    return product if along and product.tensor is not None and len(before) <= 1 else None


@RULES.reads(aten.slice.Tensor, aten.select.int, aten.narrow.default)
def _slice(node: fx.Node, read: Read) -> Reason:
    return Reason("part", f"{node.name} is a part of {node.args[0]}", "the whole")
