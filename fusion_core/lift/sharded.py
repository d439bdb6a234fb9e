"""The terms of vectors that an all_gather makes whole, of which each rank then uses its own part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import fx

from fusion_core._torch.operators import OpOverload
from fusion_core.lift.algebra import dtype_of, shape_of
from fusion_core.lift.collectives import FLOATS
from fusion_core.lift.gathers import WAIT, Gather, Gathers, own_ranges
from fusion_core.lift.term import Term, Virtual
from fusion_core.reason import Reason

PARTS_ONLY = "uses of the rank's own part only"


class Sharded:
    """What a graph does with the parts of gathered vectors.

    Args:
        graph: The graph.
        gathers: Its all_gathers.
    """

    def __init__(self, graph: fx.Graph, gathers: Gathers) -> None:
        self.graph = graph
        self.gathers = gathers
        self._parts: dict[Gather, list[fx.Node]] = defaultdict(list)
        self._split: set[Gather] = set()
        self._foreign: dict[Gather, dict[int, fx.Node]] = defaultdict(dict)
        self._squares: dict[Gather, Virtual] = {}
        self._refusals: dict[Gather, Reason] = {}

    def whole(self, node: fx.Node) -> Gather | None:
        """The gather whose vectors a tensor is, whole."""
        found = self.gathers.whole(node)
        return found if isinstance(found, Gather) else None

    def own_part(self, node: fx.Node) -> Gather | None:
        """The gather of whose vectors a node is the rank's own part."""
        for source, share in own_ranges(node):
            gather = self.whole(source)
            if gather is None or share.dim != len(shape_of(source)) - 1:
                continue
            if share.count != gather.count:
                self._split.add(gather)  # a vector of several parts, such as queries, keys and values
            elif share.index != gather.rank:
                self._foreign[gather][share.index] = node
            else:
                self._parts[gather].append(node)
                return gather
        return None

    def square(self, gather: Gather) -> Virtual:
        """The mean of squares of a gather's vectors, which no node needs to hold."""
        return self._squares.setdefault(gather, Virtual(gather.node, "mean_square"))

    def normed_whole(self, base: fx.Node, normed: fx.Node) -> None:
        """Note an RMSNorm over a tensor's whole last dimension."""
        if (gather := self.whole(base)) is not None:
            words = f"{normed.name} is the norm of whole vectors, of which more than the rank's part is used"
            self._refusals.setdefault(gather, Reason("shards", words, PARTS_ONLY))
        else:
            self.refuse(base)

    def refuse(self, normed: fx.Node) -> None:
        """Note why a tensor whose mean of squares is taken does not have a gather's vectors, if it is made of one."""
        found = self.gathers.whole(normed)
        if isinstance(found, Reason) and (gather := self.gathers.source(normed)) is not None:
            self._refusals.setdefault(gather, found)

    def anchors(self) -> Iterator[tuple[fx.Node, tuple[Term, ...]]]:
        """The gathers of which something is known, each with the terms that start from it."""
        following: Gather | None = None
        found: list[tuple[fx.Node, tuple[Term, ...]]] = []
        for node in reversed(self.graph.nodes):
            gather = self.gathers.found.get(node)
            if gather is not None and (terms := tuple(self._terms(gather, following))):
                found.append((node, terms))
            if gather is not None or _communicates(node):
                following = gather
        yield from reversed(found)

    def _terms(self, gather: Gather, following: Gather | None) -> Iterator[Term]:
        given: dict[str, Any] = {"x": gather.x, "group": gather.group}
        refusal = self._refusal(gather)
        if dtype_of(gather.x) not in FLOATS:
            refusal = Reason("dtype", f"the all_gather is of {dtype_of(gather.x)}", "a floating dtype", "x")
        notes = {"rank": gather.rank, "gathered_bytes": _row_bytes(gather), "sent_bytes": 0}
        parts = self._parts[gather]
        if parts and not self._foreign[gather] and gather not in self._split:
            more = dict.fromkeys(parts[1:], "shard")
            yield Term("all_gather_shard", given, {"shard": parts[0]}, refusal, notes, more)
        elif refusal is not None:
            yield Term("all_gather_shard", given, {"shard": gather.node}, refusal, notes)
        if gather not in self._squares:
            return
        square = self._squares[gather]
        number = notes | {"sent_bytes": _WIDTH}
        yield Term("mean_square_over_ranks", given, {"mean_square": square}, refusal, number)
        if following is not None and following in self._squares and following.group == gather.group:
            results: dict[str, fx.Node | Virtual] = {"mean_square": square, "y_mean_square": self._squares[following]}
            both = given | {"y": following.x}
            also = refusal or self._refusal(following)
            numbers = notes | {
                "gathered_bytes": _row_bytes(gather) + _row_bytes(following),
                "sent_bytes": 2 * _WIDTH,
            }
            yield Term("mean_squares_over_ranks", both, results, also, numbers, collectives=(following.node,))

    def _refusal(self, gather: Gather) -> Reason | None:
        """Why the rank's own part of a gather cannot be used alone.

        A vector of which the parts of several ranks are used is gathered for that: nobody meant the own part.
        """
        foreign = self._foreign[gather]
        if len(foreign) == 1 and not self._parts[gather] and gather not in self._split:
            ((rank, node),) = foreign.items()
            found = f"{node.name} is the part of rank {rank}, on rank {gather.rank}"
            return Reason("shards", found, "the rank's own part")
        return self._refusals.get(gather)


_WIDTH = 4
"""Bytes of a mean of squares."""


def _row_bytes(gather: Gather) -> int:
    """The bytes of a token that each rank contributes to a gather."""
    value = gather.x.meta["val"]
    return int(value.shape[-1]) * int(value.dtype.itemsize)


def _communicates(node: fx.Node) -> bool:
    """Whether a node is another collective, behind which the order of two gathers matters."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return node.target.namespace not in ("aten", "prims") and node.target is not WAIT
