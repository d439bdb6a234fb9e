"""Vectors that an all_gather makes whole: which tensor each rank contributes, in the spellings in use.

torch gathers along the first dimension, so a gather along the last one is followed by ``split`` and ``cat`` (DTensor,
``funcol.all_gather_tensor``) or by a reshape and a permutation (``torch.distributed``, vLLM).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fusion_core.groups import resolved, world_size
from fusion_core.lift.algebra import same_shape, same_size, shape_of
from fusion_core.lift.aten.views import RESHAPES
from fusion_core.lift.shares import Share, needs
from fusion_core.reason import Reason

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

GATHER = c10d.all_gather_into_tensor.default
WAIT = c10d.wait_tensor.default
_UNCHANGED = (*RESHAPES, aten.permute.default, aten.transpose.int, aten.clone.default, aten.alias.default)


@dataclass(frozen=True, eq=False)
class Gather:
    """An all_gather.

    Attributes:
        node: The node.
        x: The tensor that this rank contributes.
        group: The process group's name.
        count: The number of ranks.
    """

    node: fx.Node
    x: fx.Node
    group: str
    count: int

    @property
    def rank(self) -> int | None:
        """This process's rank in the group; None if it is not in it."""
        found = resolved(self.group)
        return None if found is None else int(found.rank())


class Gathers:
    """The all_gathers of a graph, and the tensors whose last dimension is the ranks' parts one after another."""

    def __init__(self, graph: fx.Graph) -> None:
        self.found: dict[fx.Node, Gather] = {}
        self._wholes: dict[fx.Node, Gather | Reason | None] = {}
        for node in graph.find_nodes(op="call_function", target=GATHER):
            x, count, group = node.args[:3]
            if not isinstance(x, fx.Node) or not isinstance(count, int) or not isinstance(group, str) or count < 2:
                continue
            if world_size(group) in (None, count):
                self.found[node] = Gather(node, x, group, count)

    def __bool__(self) -> bool:
        return bool(self.found)

    def whole(self, node: fx.Node) -> Gather | Reason | None:
        """The gather whose parts are a tensor's last dimension, in the order of the ranks; or why it is not that."""
        if node not in self._wholes:
            self._wholes[node] = self._whole(node)
        return self._wholes[node]

    def _whole(self, node: fx.Node) -> Gather | Reason | None:
        shape = shape_of(node)
        if not shape or not isinstance(shape[-1], int):
            return None
        gather = self.source(node)
        if gather is None or shape[-1] < gather.count:
            return None
        if shape[-1] % gather.count:
            return Reason("shards", f"{node.name} has {shape[-1]} elements of {gather.count} ranks", "equal parts")
        size = shape[-1] // gather.count
        found = self._resolve(node, Share(len(shape) - 1, size, gather.count, 0))
        if found is gather and not same_shape(shape_of(gather.x), (*shape[:-1], size)):
            return None
        return found

    def source(self, node: fx.Node) -> Gather | None:
        """The only gather from whose result a tensor is put together."""
        found: set[fx.Node] = set()
        waiting, seen = [node], {node}
        while waiting:
            current = waiting.pop()
            if current in self.found:
                found.add(current)
                continue
            if current.target not in (*_UNCHANGED, WAIT, *_JOINS, *_PARTS):
                return None
            sources = [each for each in current.all_input_nodes if "val" in each.meta and each not in seen]
            waiting += [each for each in sources if not isinstance(each.meta["val"], torch.SymInt)]
            seen.update(waiting)
        return self.found[found.pop()] if len(found) == 1 else None

    def _resolve(self, node: fx.Node, share: Share) -> Gather | Reason | None:
        """The gather of which part i is what rank i contributes, for each i."""
        shape = shape_of(node)
        if node.target is aten.cat.default:
            return self._joined(node, share)
        if share.is_one_range(shape) and all(same_size(size, 1) for size in shape[: share.dim]):
            return self._leading(node)
        below = needs(node, share) if node.target in _UNCHANGED else None
        if below is None or len(below) != 1:
            return None
        ((operand, part),) = below.items()
        if node.target in (aten.permute.default, aten.transpose.int) and not _keeps_order(node, part.dim):
            return None
        return self._resolve(operand, part)

    def _joined(self, node: fx.Node, share: Share) -> Gather | Reason | None:
        """The gather whose parts a concatenation joins."""
        parts = node.args[0]
        rank = len(shape_of(node))
        dim = node.args[1] if len(node.args) > 1 else 0
        if not isinstance(parts, list | tuple) or not isinstance(dim, int) or dim % rank != share.dim:
            return None
        sizes = [shape_of(part)[share.dim] for part in parts if isinstance(part, fx.Node)]
        if len(sizes) != share.count or not all(same_size(size, share.inner) for size in sizes):
            found = f"{node.name} joins {len(sizes)} parts of sizes {', '.join(map(str, dict.fromkeys(sizes)))}"
            return Reason("shards", found, f"{share.count} equal parts, one of each rank")
        ranges = list(map(_range, parts))
        if None in ranges:
            return None
        (source, cut, size, _), *_ = ranges  # type: ignore[misc]
        if not all(each[0] is source and each[1] == cut and same_size(each[2], size) for each in ranges if each):
            return None
        indices = [each[3] for each in ranges if each]
        if indices != list(range(share.count)):
            return Reason("shards", f"{node.name} joins the parts {indices}", "the order of the ranks")
        if all(same_size(each, 1) for each in shape_of(source)[:cut]):  # whatever the size, which may be a symbol
            return self._leading(source)
        return self._resolve(source, replace(share, dim=cut, inner=size)) if isinstance(size, int) else None

    def _leading(self, node: fx.Node) -> Gather | Reason | None:
        """The gather whose parts come one after another in a tensor, with the elements of each in their order."""
        while node not in self.found:
            reorders = node.target in (aten.permute.default, aten.transpose.int) and not _keeps_order(node)
            if reorders or node.target not in (*_UNCHANGED, c10d.wait_tensor.default):
                return None
            (node,) = (each for each in node.all_input_nodes if isinstance(each.meta.get("val"), torch.Tensor))
        return self.found[node]


def _keeps_order(node: fx.Node, source: int | None = None) -> bool:
    """Whether a permutation moves at most one dimension, that of the parts, dimensions of size 1 aside."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    shape = shape_of(operand)
    order = list(range(len(shape)))
    if node.target is aten.transpose.int:
        one, other = (int(each) % len(shape) for each in node.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    else:
        order = [int(each) % len(shape) for each in node.args[1]]  # type: ignore[union-attr,arg-type]
    rest = [each for each in order if each != source and not same_size(shape[each], 1)]
    return rest == sorted(rest)


Range = tuple[fx.Node, int, Any, int]
"""A tensor, a dimension, and the size and index of one of its equal ranges."""


def _range(part: fx.Node) -> Range | None:
    """The range of another tensor that a node is."""
    if part.target is operator.getitem and isinstance(split := part.args[0], fx.Node):
        index = part.args[1]
        if split.target is aten.split.Tensor and isinstance(source := split.args[0], fx.Node):
            dim = split.args[2] if len(split.args) > 2 else 0
            assert isinstance(dim, int)
            assert isinstance(index, int)
            dim %= len(shape_of(source))
            return source, dim, shape_of(part)[dim], index
    if part.target is aten.slice.Tensor and len(part.args) == 4:
        source, dim, start, end = part.args
        if isinstance(source, fx.Node) and isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
            dim %= len(shape_of(source))
            size = shape_of(part)[dim]
            if isinstance(size, int) and size and start % size == 0:
                return source, dim, size, start // size
    return None


def own_ranges(node: fx.Node) -> Iterator[tuple[fx.Node, Share]]:
    """The equal range of another tensor's dimension that a node is: one of several, as a part of that tensor."""
    found = _range(node)
    if found is None:
        return
    source, dim, size, index = found
    whole = shape_of(source)[dim]
    if isinstance(whole, int) and isinstance(size, int) and size and whole % size == 0 and whole > size:
        yield source, Share(dim, size, whole // size, index)


_JOINS = (aten.cat.default, operator.getitem)
_PARTS = (aten.split.Tensor, aten.slice.Tensor)
