"""How the operators of aten and prims read: one small rule for each, in terms of products of powers.

A rule gets the node and a function from an argument to its meaning, and gives the node's meaning, or None for "a new
tensor about which nothing more is known".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusion_core.lifting.meaning import Meaning, MeanSquare, Of, dtype_of, same_shape, same_size, shape_of

Rule = Callable[[fx.Node, Callable[[Any], Meaning]], Meaning | None]

RULES: dict[Any, Rule] = {}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
aten, prims = torch.ops.aten, torch.ops.prims


def _reads(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _aligned(operand: Any, meaning: Meaning, out: fx.Node) -> bool:
    """Whether an operand is broadcast as its meaning says: not at all, per row, or along the last dimension."""
    if not isinstance(operand, fx.Node):
        return True
    shape, target = shape_of(operand), shape_of(out)
    if all(same_size(size, 1) for size in shape):
        return True
    if same_shape(shape, target):
        return True
    if meaning.row is not None:
        return meaning.row and len(shape) > 0 and same_size(shape[-1], 1) and _rows_match(shape[:-1], target[:-1])
    return same_size(shape[-1], target[-1]) and all(same_size(size, 1) for size in shape[:-1])


def _rows_match(rows: tuple[Any, ...], target: tuple[Any, ...]) -> bool:
    extra = len(rows) - len(target)
    return (
        extra <= 0
        and same_shape(rows, target[-len(rows) :] if rows else ())
        and all(same_size(s, 1) for s in target[: -extra or 0])
    )


def _row(out: fx.Node, *operands: tuple[Any, Meaning]) -> bool | None:
    """Whether the result is one value per row: where every operand is, or is a number."""
    rows = {meaning.row for operand, meaning in operands if not meaning.is_constant}
    return rows.pop() if len(rows) == 1 else None


def _pointwise(node: fx.Node, operands: list[tuple[Any, Meaning]]) -> bool:
    return dtype_of(node) in _FLOATS and all(_aligned(operand, meaning, node) for operand, meaning in operands)


@_reads(aten.mul.Tensor, aten.mul.Scalar, prims.mul.default)
def _mul(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    operands = [(argument, read(argument)) for argument in node.args[:2]]
    if not _pointwise(node, operands):
        return None
    return operands[0][1].times(operands[1][1], _row(node, *operands))


@_reads(aten.div.Tensor, aten.div.Scalar, prims.div.default)
def _div(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    operands = [(argument, read(argument)) for argument in node.args[:2]]
    inverse = operands[1][1].power(-1.0)
    if inverse is None or not _pointwise(node, operands):
        return None
    return operands[0][1].times(inverse, _row(node, *operands))


@_reads(aten.pow.Tensor_Scalar)
def _pow(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    exponent = node.args[1]
    return (
        read(node.args[0]).power(float(exponent))
        if isinstance(exponent, int | float) and dtype_of(node) in _FLOATS
        else None
    )


def _power(exponent: float) -> Rule:
    return lambda node, read: read(node.args[0]).power(exponent) if dtype_of(node) in _FLOATS else None


_reads(aten.rsqrt.default, prims.rsqrt.default)(_power(-0.5))
_reads(aten.sqrt.default, prims.sqrt.default)(_power(0.5))
_reads(aten.square.default)(_power(2.0))
_reads(aten.reciprocal.default, prims.reciprocal.default)(_power(-1.0))


@_reads(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
def _add_constant(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    left, right = read(node.args[0]), read(node.args[1])
    scale = node.kwargs.get("alpha", 1)
    if not isinstance(scale, int | float) or dtype_of(node) not in _FLOATS:
        return None
    if node.target in (aten.sub.Tensor, aten.sub.Scalar):
        scale = -scale
    if right.is_constant and not left.is_constant and _same_form(node.args[0], node):
        return left.plus(scale * right.coefficient)
    if left.is_constant and scale == 1 and not right.is_constant and _same_form(node.args[1], node):
        return right.plus(left.coefficient)
    return None


def _same_form(operand: Any, node: fx.Node) -> bool:
    return isinstance(operand, fx.Node) and same_shape(shape_of(operand), shape_of(node))


@_reads(aten.mean.dim)
def _mean(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    return _over_last_dimension(node, read, 1.0)


@_reads(aten.sum.dim_IntList)
def _sum(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    size = shape_of(node.args[0])[-1:] if isinstance(node.args[0], fx.Node) else ()
    return _over_last_dimension(node, read, float(size[0])) if size and isinstance(size[0], int) else None


def _over_last_dimension(node: fx.Node, read: Callable[[Any], Meaning], coefficient: float) -> Meaning | None:
    operand, dims = node.args[0], node.args[1]
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    assert isinstance(operand, fx.Node)
    if (
        not isinstance(dims, list | tuple)
        or tuple(dims) not in ((-1,), (len(shape_of(operand)) - 1,))
        or dtype_of(node) not in _FLOATS
    ):
        return None
    meaning = read(operand)
    if meaning.row is not None or len(meaning.factors) != 1:
        return None
    ((atom, exponent),) = meaning.factors
    if not isinstance(atom, Of) or exponent != 2.0:
        return None
    return Meaning(frozenset({(MeanSquare(atom.node), 1.0)}), coefficient * meaning.coefficient, bool(keep))


@_reads(prims.convert_element_type.default, aten._to_copy.default)
def _cast(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    source, target = dtype_of(node.args[0]), dtype_of(node)  # type: ignore[arg-type]
    if source not in _FLOATS or target not in _FLOATS:
        return None
    meaning = read(node.args[0])
    if torch.promote_types(source, target) == target:
        return meaning  # every value is kept
    # rounding a tensor makes another tensor; rounding inside a product is a choice of its spelling
    return None if meaning.tensor is not None else meaning


@_reads(aten.clone.default, aten.alias.default, aten.detach.default)
def _same(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    return read(node.args[0])


@_reads(aten.copy.default)
def _copy(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    source = node.args[1]  # its value in the strides of the first argument: what an in-place collective leaves behind
    if not isinstance(source, fx.Node) or not _same_form(source, node) or dtype_of(source) != dtype_of(node):
        return None
    return read(source)


@_reads(torch.ops._c10d_functional.wait_tensor.default)
def _wait(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    waited = node.args[0]
    # what a collective gives is a new tensor; waiting again for what was waited for changes nothing
    return read(waited) if isinstance(waited, fx.Node) and waited.target is node.target else None


@_reads(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
)  # fmt: skip
def _view(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    before, after = shape_of(operand), shape_of(node)
    meaning = read(operand)
    if same_shape(before, after):
        return meaning
    if node.target is aten.expand.default:
        return None
    if meaning.row is None:
        return meaning if before and after and same_size(before[-1], after[-1]) else None
    if not meaning.row:  # one value per row, its dimension dropped: a trailing 1 brings it back
        return meaning.shaped(True) if after and same_size(after[-1], 1) and same_shape(before, after[:-1]) else None
    if after and same_size(after[-1], 1):
        return meaning
    return meaning.shaped(False) if same_shape(before[:-1], after) else None


@_reads(aten.full.default)
def _full(node: fx.Node, read: Callable[[Any], Meaning]) -> Meaning | None:
    value = node.args[1]
    return Meaning.constant(value) if not node.args[0] and isinstance(value, int | float) else None
