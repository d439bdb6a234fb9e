"""Computes only a rank's own part of what a model computes whole and then cuts.

Hugging Face's tensor parallelism gathers queries, keys and values of all heads where a norm spans them, computes the
attention of all heads on every rank, and gives each rank its own heads' part for the next matrix product. The cut moves
up to the gathered tensors, past everything whose result nothing else uses. Each element is computed as before, from the
same numbers; what no rank's part needs is not computed. The collectives stay as they are, so other ranks may or may not
do the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import torch
from torch import fx

from fusion_core.emit.inserter import Inserter
from fusion_core.lift.algebra import shape_of
from fusion_core.lift.gathers import Gather, Gathers, own_ranges
from fusion_core.lift.rules import is_cheap
from fusion_core.lift.shares import TUPLES, Needs, Share, local_arguments, needs

PROVENANCE = "fusion_core.narrowed"
"""The mark of nodes that narrowing adds."""

aten = torch.ops.aten


@dataclass
class _Plan:
    """What to compute in part.

    Attributes:
        root: The cut.
        source: The tensor that it cuts.
        inside: Nodes that are computed in part → the part.
        cut: Nodes that stay whole → the parts of them that are cut out.
        gathered: Whether any of those is a gathered tensor.
    """

    root: fx.Node
    source: fx.Node
    inside: Needs = field(default_factory=dict)
    cut: dict[fx.Node, list[Share]] = field(default_factory=dict)
    gathered: bool = False


def narrow(graph: fx.Graph, gathers: Gathers) -> int:
    """Move cuts of a graph up to the gathered tensors behind them; returns the number of cuts that moved."""
    counts = {gather.count for gather in gathers.found.values()}
    moved = 0
    position: dict[fx.Node, int] = {}
    for root in list(graph.nodes):
        for source, share in own_ranges(root) if root.op == "call_function" else ():
            if share.count not in counts or isinstance(gathers.whole(source), Gather):
                continue
            position = position or {node: index for index, node in enumerate(graph.nodes)}
            plan = _planned(root, source, share, position, gathers)
            if plan is not None and plan.gathered and plan.inside:
                _apply(graph, plan, position)
                position = {}  # it has other nodes now
                moved += 1
    return moved


def _planned(
    root: fx.Node, source: fx.Node, share: Share, position: dict[fx.Node, int], gathers: Gathers
) -> _Plan | None:
    """The nodes behind a cut that can be computed in part; None if a tensor's part cannot be cut out."""
    whole: set[fx.Node] = set()
    while True:
        found = _plan(root, source, share, position, gathers, whole)
        if not isinstance(found, fx.Node):
            return found
        # a tuple cannot be cut; its elements can
        whole.update(found.users)


def _plan(
    root: fx.Node,
    source: fx.Node,
    share: Share,
    position: dict[fx.Node, int],
    gathers: Gathers,
    whole: Set[fx.Node],
) -> _Plan | fx.Node | None:
    """A plan in which some nodes stay whole; a tuple that it would have to cut; None if another part cannot be cut."""
    plan = _Plan(root, source)
    wanted: dict[fx.Node, list[Share]] = {source: [share]}
    done = {root, *(node for node in root.all_input_nodes if node is not source)}
    heap = [(-position[source], source)]
    while heap:
        _, node = heapq.heappop(heap)  # the last one: all its users are decided
        parts = wanted[node]
        below = None if node in whole else _inside(node, parts, done, gathers)
        if below is None:
            if node.target in TUPLES:
                return node
            if not all(_can_cut(node, part) for part in parts):
                return None
            plan.cut[node] = parts
            plan.gathered |= isinstance(gathers.whole(node), Gather)
            continue
        plan.inside[node] = parts[0]
        done.add(node)
        for operand, part in below.items():
            if operand not in wanted:
                wanted[operand] = []
                heapq.heappush(heap, (-position[operand], operand))
            if part not in wanted[operand]:
                wanted[operand].append(part)
    return plan


def _inside(node: fx.Node, parts: list[Share], done: set[fx.Node], gathers: Gathers) -> Needs | None:
    """The parts of operands from which a node is computed in part; None if it stays whole."""
    if node.op != "call_function" or len(parts) > 1 or isinstance(gathers.whole(node), Gather):
        return None
    alone = all(user in done for user in node.users)
    if not alone and not _is_gathered_as_before(node, gathers):
        return None  # it would be computed twice
    below = needs(node, parts[0])
    return None if below is None or local_arguments(node, parts[0], {}) is None else below


def _is_gathered_as_before(node: fx.Node, gathers: Gathers) -> bool:
    """Whether a node is a gathered tensor in another dtype or shape, which a norm may read whole."""
    while is_cheap(node) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        if isinstance(gathers.whole(node), Gather):
            return True
    return False


def _can_cut(node: fx.Node, share: Share) -> bool:
    """Whether a part of a tensor can be cut out."""
    shape = shape_of(node)
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return share.is_one_range(shape) or all(isinstance(size, int) for size in shape)


def _apply(graph: fx.Graph, plan: _Plan, position: dict[fx.Node, int]) -> None:
    """Compute the parts, next to the wholes, and remove the wholes that nothing uses any more."""
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    local: dict[fx.Node, dict[Share, fx.Node]] = {}
    for node in sorted((*plan.inside, *plan.cut), key=position.__getitem__):
        place = last_input[0] if node.op == "placeholder" else node
        insert = Inserter(graph, position, place, plan.root, PROVENANCE)
        if node in plan.cut:
            local[node] = {share: _cut(insert, node, share) for share in plan.cut[node]}
            continue
        share = plan.inside[node]
        below = needs(node, share)
        assert below is not None
        given = local_arguments(node, share, {operand: local[operand][part] for operand, part in below.items()})
        assert given is not None
        local[node] = {share: insert(node.target, *given)}
    (part,) = local[plan.source].values()
    plan.root.replace_all_uses_with(part)
    for node in _unused(plan):
        graph.erase_node(node)


def _cut(insert: Inserter, node: fx.Node, share: Share) -> fx.Node:
    """A part of a tensor that stays whole."""
    shape = shape_of(node)
    if share.is_one_range(shape):
        return insert(aten.slice.Tensor, (node, share.dim, share.start, share.start + share.inner))
    outer = shape[share.dim] // (share.count * share.inner)
    before, after = list(shape[: share.dim]), list(shape[share.dim + 1 :])
    split = insert(aten.reshape.default, (node, [*before, outer, share.count, share.inner, *after]))
    part = insert(aten.slice.Tensor, (split, share.dim + 1, share.index, share.index + 1))
    return insert(aten.reshape.default, (part, [*before, outer * share.inner, *after]))


def _unused(plan: _Plan) -> Iterator[fx.Node]:
    """The cut and the nodes that only it used, users before what they use."""
    waiting, gone = [plan.root], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node.users or node.op != "call_function" or node in gone:
            continue
        sources = [each for each in node.all_input_nodes if each in plan.inside or each.target in TUPLES]
        gone.add(node)
        yield node
        waiting += sources
