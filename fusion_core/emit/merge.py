"""Merges all_reduces whose results are only added together into one.

Parallel attention and MLP (Cohere), and routed and shared experts (DeepSeek-V3), have two all_reduces whose results are
added. An all_reduce is linear, so each rank can add its inputs first and reduce the sum once: half the traffic, one
latency less, and one chain after it.

The numbers are added in another order. Each rank rounds its own sum; in return there is one all_reduce and one
addition of results fewer that rounds. For independent values the expected squared error is the same if two results
were added directly, and about a tenth larger if a residual was added in between or three are merged.

float16 is not merged, since its largest number is 65504: the inputs on one rank may exceed it when added, although both
results and their sum are small. With +40000 and +40000 on one rank and -30000 and -30000 on the other, the sum is 20000
but would become infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_core._torch.operators import schema_of
from fusion_core.emit.inserter import Inserter
from fusion_core.lift.algebra import dtype_of, same_shape, same_size, shape_of
from fusion_core.lift.collectives import all_reduces
from fusion_core.lift.readings import Readings
from fusion_core.lift.rules import writers
from fusion_core.lift.term import Term
from fusion_core.reason import Reason
from fusion_core.report.record import Merge

PROVENANCE = "fusion_core.merged"
"""The mark of nodes that merging adds."""

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


OFF = Reason(
    "merge",
    "they could be merged, but merging is off",
    "the same graphs on all ranks",
    hint="FusionConfig(merge=True) or FUSION_CORE_MERGE=1 merges them",
)
"""The reason for all_reduces that could be merged and are not. A rank cannot know that the others' graphs contain both:
after a graph break in between, one rank runs two all_reduces, which would silently pair with the others' merged one."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One all_reduce in a tree of additions.

    Attributes:
        anchor: The all_reduce.
        x: Its input.
        group: Its process group.
        leaf: The operand of an addition: its result, or a view of it.
        between: The result and the views of it, the leaf first.
        alone: Whether nothing else uses any of these.
    """

    anchor: fx.Node
    x: fx.Node
    group: Any
    leaf: fx.Node
    between: tuple[fx.Node, ...]
    alone: bool


def merge_all_reduces(
    graph: fx.Graph, readings: Readings, most: int | None, blocked: Callable[[str], Reason | None] = lambda group: None
) -> tuple[Merge, ...]:
    """Merge all_reduces of a graph, and return the outcome for each set of them that is added together.

    Args:
        graph: The graph.
        readings: The readings of other frameworks' operators.
        most: The largest number of merges; None for no limit.
        blocked: Returns the reason why those of a process group must not be merged, or None.
    """
    results = _results(graph, readings)
    if len(results) < 2:
        return ()
    position = {node: index for index, node in enumerate(graph.nodes)}
    found, left = [], most
    for root in [node for node in graph.nodes if _is_add(node) and _inner(node) is None]:
        additions = list(_additions(root))
        parts = _independent(list(_parts(additions, results)), position)
        parts.sort(key=lambda part: position[part.anchor])
        groups = list(dict.fromkeys(part.group for part in parts))
        for group in groups:
            own = [part for part in parts if part.group == group]
            labels = tuple(dict.fromkeys(part.anchor.name for part in own))  # the nodes are gone afterwards
            if len(labels) < 2:
                continue
            reasons = tuple(_refusals(own, additions, position))
            if not reasons and isinstance(group, str) and (reason := blocked(group)) is not None:
                reasons = (reason,)
            if not reasons and left == 0:
                reasons = (Reason("limit", f"limit is {most} rewrites", "a higher limit"),)
            if not reasons:
                _apply(graph, own, additions, position)
                left = None if left is None else left - 1
            found.append(Merge(labels, reasons))
        if len(groups) > 1:
            # the last one of each group, which remains whether or not the group was merged
            names = tuple({part.group: part.anchor.name for part in parts}.values())
            words = f"they are of the process groups {', '.join(map(str, groups))}"
            found.append(Merge(names, (Reason("group", words, "one process group"),)))
    return tuple(found)


def mergeable(graph: fx.Graph, readings: Readings) -> tuple[Merge, ...]:
    """The all_reduces of a graph that `merge_all_reduces` would merge, with `OFF` as the reason; changes nothing."""
    found = merge_all_reduces(graph, readings, None, lambda group: OFF)
    return tuple(merge for merge in found if merge.reasons == (OFF,))


def _results(graph: fx.Graph, readings: Readings) -> dict[fx.Node, tuple[fx.Node, Term]]:
    """The node of a result → the all_reduce and its term, for all_reduces whose input can be replaced."""
    return {
        result: (anchor, term)
        for anchor, term in all_reduces(graph, readings)
        if term.refusal is None
        and isinstance(result := term.results["reduced"], fx.Node)
        and (result is anchor or len(anchor.users) == 1)
        and isinstance(term.operands["x"], fx.Node)
        and anchor.args
        and anchor.args[0] is term.operands["x"]
    }


def _is_add(node: fx.Node) -> bool:
    """Whether a node adds two different tensors of its own dtype."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or len(set(node.args)) != 2:
        return False
    return all(isinstance(arg, fx.Node) and dtype_of(arg) == dtype_of(node) for arg in node.args)


def _inner(node: fx.Node) -> fx.Node | None:
    """The addition that a sum is only a part of; None if it is the whole sum."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and _is_add(user) and same_shape(shape_of(user), shape_of(node)) else None


def _additions(root: fx.Node) -> Iterator[fx.Node]:
    """The additions of a sum, the last one first."""
    yield root
    for operand in root.all_input_nodes:
        if _is_add(operand) and _inner(operand) is root:
            yield from _additions(operand)


def _leaves(additions: list[fx.Node]) -> list[fx.Node]:
    """The operands of a sum."""
    return [operand for node in additions for operand in node.all_input_nodes if operand not in additions]


def _parts(additions: list[fx.Node], results: Mapping[fx.Node, tuple[fx.Node, Term]]) -> Iterator[_Part]:
    """The all_reduces among the operands of a sum."""
    for operand in _leaves(additions):
        between = [operand]
        while between[-1].target in _VIEWS and isinstance(source := between[-1].args[0], fx.Node):
            between.append(source)
        if between[-1] in results and same_shape(shape_of(operand), shape_of(additions[0])):
            anchor, term = results[between[-1]]
            x = anchor.args[0]  # not the term's, which an earlier merge may have replaced
            assert isinstance(x, fx.Node)
            alone = all(len(node.users) == 1 for node in between)
            yield _Part(anchor, x, term.operands["group"], operand, tuple(between), alone)


def _independent(parts: list[_Part], position: Mapping[fx.Node, int]) -> list[_Part]:
    """The parts without those that others are computed from, such as the residual stream after a model's first sum."""
    return [
        part
        for part in parts
        if part.alone
        or not any(_hangs_on(each.x, part.anchor, position) for each in parts if each.anchor is not part.anchor)
    ]


def _refusals(parts: list[_Part], additions: list[fx.Node], position: Mapping[fx.Node, int]) -> Iterator[Reason]:
    """The reasons why these all_reduces cannot be merged."""
    last, root = parts[-1], additions[0]
    if dtype_of(last.x) is torch.float16:
        words = "the sums are of float16, in which what one rank adds first may overflow"
        yield Reason("dtype", words, "bfloat16 or float32")
    if shared := dict.fromkeys(part.anchor.name for part in parts if not part.alone):
        yield Reason("live_outputs", f"the result of {', '.join(shared)} is also used outside the sum", "no other use")
    for part in parts:
        alike = same_shape(shape_of(part.x), shape_of(last.x))
        if not alike and not all(isinstance(size, int) for size in (*shape_of(part.x), *shape_of(last.x))):
            yield Reason("reshape", f"{part.anchor.name} has another shape, known only at run time", "one shape")
        elif not (_same_layout(part.x, last.x) if alike else _is_contiguous(part.x) and _is_contiguous(last.x)):
            yield Reason("layout", f"{part.x.name} has other strides than {last.x.name}", "the same ones", "x")
        if found := _writer(part, last, position):
            yield Reason("mutation", f"{found.name} writes into {part.x.name}", "an input that stays as it is", "x")
    for node in (*additions, *_leaves(additions)):
        # a sum that loses an operand gets the strides of the other, but later views were made for its old strides
        if same_shape(shape_of(node), shape_of(root)) and not _same_layout(node, root):
            yield Reason("layout", f"{node.name} has other strides than {root.name}", "the same ones")


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors of one shape have the same strides."""
    return same_shape(_strides(a), _strides(b))


def _is_contiguous(node: fx.Node) -> bool:
    """Whether a tensor whose sizes are numbers is contiguous."""
    expected = 1
    strides: list[int] = []
    for size in reversed(shape_of(node)):
        strides.insert(0, 0 if size == 1 else expected)
        expected *= size
    return same_shape(_strides(node), strides)


def _strides(node: fx.Node) -> list[Any]:
    """A tensor's strides, with 0 for dimensions of size 1, whose stride is meaningless."""
    return [
        0 if same_size(size, 1) else stride
        for size, stride in zip(shape_of(node), node.meta["val"].stride(), strict=True)
    ]


def _writer(part: _Part, last: _Part, position: Mapping[fx.Node, int]) -> fx.Node | None:
    """A node that writes into an input between its own all_reduce and the merged one, or None."""
    node = part.x
    while node.op == "call_function" and _is_alias(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]  # a view: others may write into what it views
    between = (user for user in writers(node) if position[part.anchor] < position[user] < position[last.anchor])
    return next(between, None)


def _is_alias(node: fx.Node) -> bool:
    """Whether a node's result is memory of its first argument."""
    returns: Any = getattr(schema_of(node.target), "returns", ())
    return len(returns) == 1 and returns[0].alias_info is not None


def _hangs_on(node: fx.Node, anchor: fx.Node, position: Mapping[fx.Node, int]) -> bool:
    """Whether a value is computed from an all_reduce."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current is anchor:
            return True
        for source in current.all_input_nodes:
            if source not in seen and position[source] >= position[anchor]:
                seen.add(source)
                stack.append(source)
    return False


def _apply(graph: fx.Graph, parts: list[_Part], additions: list[fx.Node], position: dict[fx.Node, int]) -> None:
    """Make the last all_reduce reduce the sum; remove the others and one addition for each."""
    *others, last = parts
    insert = Inserter(graph, position, last.anchor.prev, last.x, PROVENANCE)
    total = last.x
    for part in others:
        x = part.x
        if not same_shape(shape_of(x), shape_of(last.x)):
            x = insert(aten.reshape.default, (x, list(shape_of(last.x))))
        total = insert(aten.add.Tensor, (x, total))
    last.anchor.update_arg(0, total)
    for part in others:
        (addition,) = part.leaf.users
        (rest,) = (arg for arg in addition.all_input_nodes if arg is not part.leaf)
        addition.replace_all_uses_with(rest)
        for node in (addition, *part.between):
            graph.erase_node(node)
        additions.remove(addition)
        if part.between[-1] is not part.anchor:  # torch's all_reduce has a wait; another framework's has none
            graph.erase_node(part.anchor)
    for node in reversed(additions):  # a sum may change shape: if only a bias is left, to the bias's
        with insert.fake_mode:
            node.meta["val"] = aten.add.Tensor(*fx.map_arg(node.args, lambda arg: arg.meta["val"]))
