"""One of several equal parts of a tensor along a dimension, and from which parts of its operands a node computes it.

Tensor parallelism gives each rank one part of a vector. A model that gathers the whole and later takes its own part out
again computes everything in between for all ranks. These rules say, node by node, which parts of the operands suffice.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from fusion_core._torch.operators import OpOverload, schema_of
from fusion_core.lift.algebra import same_size, shape_of
from fusion_core.lift.aten.views import RESHAPES

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True, slots=True)
class Share:
    """Part ``index`` of ``count`` equal parts of a dimension.

    The dimension has ``outer * count * inner`` elements, of which ``[:, index, :]`` are the part. ``outer`` is 1 for
    the heads of a tensor ``[batch, heads, ...]``, and the batch size where batch and heads are one dimension.

    Attributes:
        dim: The dimension, counted from the front.
        inner: Neighbouring elements of each part.
        count: The number of parts.
        index: The part.
    """

    dim: int
    inner: int
    count: int
    index: int

    def is_one_range(self, shape: Sequence[Any]) -> bool:
        """Whether the part is one range of the dimension."""
        return same_size(shape[self.dim], self.count * self.inner)

    @property
    def start(self) -> int:
        """The first element, if the part is one range."""
        return self.index * self.inner


Needs = dict[fx.Node, Share]
"""The operands of which a part suffices; the others are needed whole."""


def needs(node: fx.Node, share: Share) -> Needs | None:
    """The parts of its operands from which a node computes a part of its result; None if there is no such rule."""
    if node.target is operator.getitem:
        return _of_tuple(node, share)
    if not isinstance(node.target, OpOverload):
        return None
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in node.target.tags and _is_plain(node.target):
        rule = _pointwise
    return None if rule is None else rule(node, share)


def local_arguments(
    node: fx.Node, share: Share, local: Mapping[fx.Node, fx.Node]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with which a node computes its part; None if a size among them cannot be written down.

    Args:
        node: The node.
        share: The part of its result.
        local: The parts of its operands, as `needs` names them.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: local.get(operand, operand))
    if node.target not in _SIZED:
        return tuple(args), dict(kwargs)
    sizes: list[Any] = list(cast(Any, args[1]))
    if not isinstance(sizes[share.dim], int) or sizes[share.dim] != -1:
        size = shape_of(node)[share.dim]
        if isinstance(size, int):
            sizes[share.dim] = size // share.count
        elif -1 not in [each for each in sizes if isinstance(each, int)]:
            sizes[share.dim] = -1
        else:
            return None
    return (args[0], sizes, *args[2:]), dict(kwargs)


def _is_plain(target: OpOverload) -> bool:
    """Whether an operator draws no random numbers and writes into nothing."""
    return torch.Tag.nondeterministic_seeded not in target.tags and not schema_of(target).is_mutable


def _tensors(argument: Any) -> Iterator[fx.Node]:
    for each in argument if isinstance(argument, list | tuple) else (argument,):
        if isinstance(each, fx.Node) and isinstance(each.meta.get("val"), torch.Tensor):
            yield each


def _pointwise(node: fx.Node, share: Share) -> Needs | None:
    """Operands are aligned at the last dimension; one of size 1 there is the same for all parts."""
    rank = len(shape_of(node))
    found: Needs = {}
    for operand in (each for argument in (*node.args, *node.kwargs.values()) for each in _tensors(argument)):
        shape = shape_of(operand)
        dim = share.dim - (rank - len(shape))
        if dim < 0 or same_size(shape[dim], 1):
            continue
        if not same_size(shape[dim], shape_of(node)[share.dim]):
            return None
        found[operand] = replace(share, dim=dim)
    return found


def _reshape(node: fx.Node, share: Share) -> Needs | None:
    """Each part is the same elements before and after."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    before, after = shape_of(operand), shape_of(node)
    below = _Size.of(share.inner) * _Size.product(after[share.dim + 1 :])
    for dim in reversed(range(len(before))):
        inner = below.over(_Size.product(before[dim + 1 :]))
        if inner is None:
            return None
        if inner.symbols == 1 and _Size.of(before[dim]).number % (inner.number * share.count) == 0:
            if node.target in _SQUEEZES and dim in (_dims(node, 1, len(before)) or range(len(before))):
                return None  # the part may have size 1 there, where the whole has more
            return {operand: replace(share, dim=dim, inner=inner.number)}
    return None


@dataclass(frozen=True)
class _Size:
    """A size as a number times an expression of symbols."""

    number: int
    symbols: Any

    @classmethod
    def of(cls, size: Any) -> _Size:
        if isinstance(size, int):
            return cls(size, 1)
        number, symbols = size.node.expr.as_coeff_Mul()
        return cls(int(number), symbols) if number.is_Integer else cls(1, size.node.expr)

    @classmethod
    def product(cls, sizes: Sequence[Any]) -> _Size:
        found = cls(1, 1)
        for size in sizes:
            found *= cls.of(size)
        return found

    def __mul__(self, other: _Size) -> _Size:
        return _Size(self.number * other.number, self.symbols * other.symbols)

    def over(self, other: _Size) -> _Size | None:
        """The quotient, if it is a size."""
        if other.number <= 0 or self.number <= 0 or self.number % other.number:
            return None
        if self.symbols == other.symbols:
            return _Size(self.number // other.number, 1)
        symbols = self.symbols / other.symbols
        return _Size(self.number // other.number, symbols) if symbols.as_numer_denom()[1] == 1 else None


def _dims(node: fx.Node, place: int, rank: int) -> list[int] | None:
    """A list of dimensions among a node's arguments, counted from the front."""
    given = node.args[place] if len(node.args) > place else None
    dims = given if isinstance(given, list | tuple) else [given]
    if not dims or not all(isinstance(dim, int) for dim in dims):
        return None
    return [int(dim) % rank for dim in dims]  # type: ignore[arg-type]


def _permute(node: fx.Node, share: Share) -> Needs | None:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    dims = _dims(node, 1, len(shape_of(operand)))
    return None if dims is None else {operand: replace(share, dim=dims[share.dim])}


def _transpose(node: fx.Node, share: Share) -> Needs | None:
    operand, one, other = node.args[:3]
    assert isinstance(operand, fx.Node)
    if not isinstance(one, int) or not isinstance(other, int):
        return None
    rank = len(shape_of(operand))
    swapped = {one % rank: other % rank, other % rank: one % rank}
    return {operand: replace(share, dim=swapped.get(share.dim, share.dim))}


def _expand(node: fx.Node, share: Share) -> Needs | None:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    shape = shape_of(operand)
    dim = share.dim - (len(shape_of(node)) - len(shape))
    if dim < 0 or (same_size(shape[dim], 1) and not same_size(shape_of(node)[share.dim], 1)):
        return {}
    return {operand: replace(share, dim=dim)}


def _along_another(node: fx.Node, share: Share) -> Needs | None:
    """An operator along one dimension, which leaves the others as they are: a slice, a softmax, a split."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    place = 2 if node.target in _SPLITS else 1
    dims = _dims(node, place, len(shape_of(operand))) if len(node.args) > place else [0]
    return None if dims is None or share.dim in dims else {operand: share}


def _reduction(node: fx.Node, share: Share) -> Needs | None:
    """A reduction over other dimensions."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    rank = len(shape_of(operand))
    reduced = _dims(node, 1, rank)
    if reduced is None:
        return None
    if len(shape_of(node)) == rank:
        return None if share.dim in reduced else {operand: share}
    kept = [dim for dim in range(rank) if dim not in reduced]
    return {operand: replace(share, dim=kept[share.dim])}


def _cat(node: fx.Node, share: Share) -> Needs | None:
    dims = _dims(node, 1, len(shape_of(node))) if len(node.args) > 1 else [0]
    if dims is None or share.dim in dims:
        return None
    return dict.fromkeys(_tensors(node.args[0]), share)


def _bmm(node: fx.Node, share: Share) -> Needs | None:
    one, other = node.args[:2]
    assert isinstance(one, fx.Node)
    assert isinstance(other, fx.Node)
    if one is other and share.dim > 0:  # needed in part and whole
        return None
    return ({one: share, other: share}, {one: share}, {other: share})[share.dim]


def _attention(node: fx.Node, share: Share) -> Needs | None:
    """The heads of ``[batch, heads, tokens, size]``; of keys and values there may be fewer."""
    if share.dim != 1:
        return None
    named = dict(zip((each.name for each in schema_of(node.target).arguments), node.args, strict=False)) | node.kwargs
    if named.get("dropout_p", 0.0) != 0.0:
        return None
    found: Needs = {}
    query = named["query"]
    assert isinstance(query, fx.Node)
    heads = shape_of(query)[1]
    for name in ("query", "key", "value", "attn_bias", "attn_mask"):
        operand = named.get(name)
        if not isinstance(operand, fx.Node):
            continue
        shape = shape_of(operand)
        dim = len(shape) - 3
        if dim < 0 or (name.startswith("attn") and same_size(shape[dim], 1)):
            continue
        own = shape[dim]
        if not isinstance(own, int) or not isinstance(heads, int) or share.inner * own % heads:
            return None
        found[operand] = replace(share, dim=dim, inner=share.inner * own // heads)
    return found if all(each.inner for each in found.values()) else None


def _of_tuple(node: fx.Node, share: Share) -> Needs | None:
    """An element of a split, or the first result of an attention: the others have other shapes."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    return {source: share} if source.target in _SPLITS or (source.target in _ATTENTIONS and index == 0) else None


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_ATTENTIONS = tuple(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
TUPLES = (*_SPLITS, *_ATTENTIONS)
"""Operators with several results, of which a `getitem` takes each."""
_REDUCTIONS = (aten.amax.default, aten.amin.default, aten.sum.dim_IntList, aten.mean.dim)
_UNARY = (aten.clone.default, aten.alias.default, aten._to_copy.default, prims.convert_element_type.default)
_SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
"""Operators whose second argument is the shape of their result."""

_RULES: dict[Any, Callable[[fx.Node, Share], Needs | None]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.expand.default: _expand,
    aten.slice.Tensor: _along_another,
    aten._softmax.default: _along_another,
    aten._log_softmax.default: _along_another,
    aten.cumsum.default: _along_another,
    aten.split.Tensor: _along_another,
    aten.split_with_sizes.default: _along_another,
    aten.cat.default: _cat,
    aten.bmm.default: _bmm,
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_UNARY, _pointwise),
    **dict.fromkeys(_ATTENTIONS, _attention),
}
