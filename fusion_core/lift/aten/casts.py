"""Casts, copies, waits and constants: operators whose result has the value of an argument."""

from __future__ import annotations

import torch
from torch import fx

from fusion_core.lift.algebra import Product, dtype_of, promoted, same_shape, shape_of
from fusion_core.lift.rules import FLOATS, Read, Rules
from fusion_core.reason import Reason

RULES = Rules()
aten, prims = torch.ops.aten, torch.ops.prims


@RULES.reads(prims.convert_element_type.default, aten._to_copy.default)
def _cast(node: fx.Node, read: Read) -> Product | Reason | None:
    source, target = dtype_of(node.args[0]), dtype_of(node)  # type: ignore[arg-type]
    if source not in FLOATS or target not in FLOATS:
        return None
    product = read(node.args[0])
    if promoted(source, target) == target:
        return product  # lossless
    # rounding a tensor makes another tensor; rounding inside a product is only another spelling
    if product.multiple is None:
        return product
    found = f"{node.name} rounds {product.multiple} to {str(target).removeprefix('torch.')}"
    return Reason("rounded", found, "the value as it is")


@RULES.reads(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(node: fx.Node, read: Read) -> Product | None:
    return read(node.args[0])


@RULES.reads(aten.copy.default)
def _copy(node: fx.Node, read: Read) -> Product | None:
    source = node.args[1]  # its value in the strides of the first argument, as after an in-place collective
    if not isinstance(source, fx.Node) or not same_shape(shape_of(source), shape_of(node)):
        return None
    return read(source) if dtype_of(source) == dtype_of(node) else None


@RULES.reads(torch.ops._c10d_functional.wait_tensor.default)
def _wait(node: fx.Node, read: Read) -> Product | None:
    waited = node.args[0]
    # a collective's result is a new tensor; a second wait for it changes nothing
    return read(waited) if isinstance(waited, fx.Node) and waited.target is node.target else None


@RULES.reads(aten.full.default)
def _full(node: fx.Node, read: Read) -> Product | None:
    value = node.args[1]
    return Product.constant(value) if isinstance(value, int | float) and dtype_of(node) in FLOATS else None


def keeps_value(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node with the same product as ``source`` has its exact values, not rounded ones."""
    before, after = dtype_of(source), dtype_of(node)
    return before is not None and after is not None and promoted(before, after) == after
