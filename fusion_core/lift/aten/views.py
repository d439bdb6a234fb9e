"""Views: other shapes of the same values, and parts of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Function, Meaning, same_shape, same_size, shape_of
from fusion_core.lift.rules import Read, Rules
from fusion_core.reason import Reason

RULES = Rules()
aten = torch.ops.aten

RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default,
)  # fmt: skip
"""Operators that give all values of their argument in the same order."""


@RULES.reads(*RESHAPES)
def _reshape(node: fx.Node, read: Read) -> Meaning | Reason | None:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    before, after = shape_of(operand), shape_of(node)
    meaning = read(operand)
    if same_shape(before, after):
        return meaning
    if meaning.row is None:
        if not before or not after:
            return meaning if meaning.is_constant or all(same_size(size, 1) for size in (*before, *after)) else None
        if same_size(before[-1], after[-1]):
            return meaning
        found = f"{node.name} splits or joins the last dimension of {operand.name}: {before[-1]} becomes {after[-1]}"
        return Reason("heads", found, "the last dimension as it is")
    if after and same_size(after[-1], 1):  # one value per row; where its dimension was dropped, this brings it back
        return meaning.shaped(True)
    if not meaning.row or not before:
        return None
    if _joins(before, after):  # a value for each group of neighbours, spread over the group
        return Meaning(frozenset({(Function("spread", meaning, float(before[-1])), 1.0)}))
    return meaning.shaped(False) if same_shape(before[:-1], after) else None


def _joins(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether the last dimensions become one, and no row is cut."""
    if not after or not isinstance(before[-1], int) or not isinstance(after[-1], int) or before[-1] <= 1:
        return False
    return after[-1] > before[-1] and after[-1] % before[-1] == 0


@RULES.reads(aten.expand.default)
def _expand(node: fx.Node, read: Read) -> Meaning | None:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    before, after = shape_of(operand), shape_of(node)
    meaning = read(operand)
    if meaning.is_constant or same_shape(before, after):
        return meaning
    if meaning.row is not None:  # one value per row, along the row
        return meaning if meaning.row and same_shape(before[:-1], after[:-1]) else None
    if all(same_size(size, 1) for size in before):
        return meaning if meaning.multiple is not None else None  # one number for all
    along = bool(before) and same_size(before[-1], after[-1]) and all(same_size(size, 1) for size in before[:-1])
    # a vector along the last dimension, for every row; of what is computed from it, a tensor is only ever looked at
    return meaning if along and meaning.tensor is not None and len(before) <= 1 else None


@RULES.reads(aten.slice.Tensor, aten.select.int, aten.narrow.default)
def _slice(node: fx.Node, read: Read) -> Reason:
    return Reason("part", f"{node.name} is a part of {node.args[0]}", "the whole")
