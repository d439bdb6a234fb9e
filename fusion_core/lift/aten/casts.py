"""Casts, copies, waits and constants: what has the value of something else."""

from __future__ import annotations

import torch
from torch import fx

from fusion_core.lift.algebra import Meaning, dtype_of, promoted, same_shape, shape_of
from fusion_core.lift.rules import FLOATS, Read, Rules
from fusion_core.reason import Reason

RULES = Rules()
aten, prims = torch.ops.aten, torch.ops.prims


@RULES.reads(prims.convert_element_type.default, aten._to_copy.default)
def _cast(node: fx.Node, read: Read) -> Meaning | Reason | None:
    source, target = dtype_of(node.args[0]), dtype_of(node)  # type: ignore[arg-type]
    if source not in FLOATS or target not in FLOATS:
        return None
    meaning = read(node.args[0])
    if promoted(source, target) == target:
        return meaning  # every value is kept
    # rounding a tensor makes another tensor; rounding inside a product is a choice of its spelling
    if meaning.multiple is None:
        return meaning
    found = f"{node.name} rounds {meaning.multiple} to {str(target).removeprefix('torch.')}"
    return Reason("rounded", found, "the value as it is")


@RULES.reads(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(node: fx.Node, read: Read) -> Meaning | None:
    return read(node.args[0])


@RULES.reads(aten.copy.default)
def _copy(node: fx.Node, read: Read) -> Meaning | None:
    source = node.args[1]  # its value in the strides of the first argument: what an in-place collective leaves behind
    if not isinstance(source, fx.Node) or not same_shape(shape_of(source), shape_of(node)):
        return None
    return read(source) if dtype_of(source) == dtype_of(node) else None


@RULES.reads(torch.ops._c10d_functional.wait_tensor.default)
def _wait(node: fx.Node, read: Read) -> Meaning | None:
    waited = node.args[0]
    # what a collective gives is a new tensor; waiting again for what was waited for changes nothing
    return read(waited) if isinstance(waited, fx.Node) and waited.target is node.target else None


@RULES.reads(aten.full.default)
def _full(node: fx.Node, read: Read) -> Meaning | None:
    value = node.args[1]
    return Meaning.constant(value) if isinstance(value, int | float) and dtype_of(node) in FLOATS else None


def keeps_value(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node that reads as ``source`` reads has each of its values, and not a rounded one."""
    before, after = dtype_of(source), dtype_of(node)
    return before is not None and after is not None and promoted(before, after) == after
