"""One all_reduce in place of several whose results are only added together: the sum of sums is a sum.

Attention and MLP side by side (Cohere), and routed and shared experts (DeepSeek-V3), leave two all_reduces
that meet in an addition. An all_reduce is linear, so that what each rank has is added first and reduced once: half the
traffic and one latency less, and what follows is one chain.

The numbers are added in another order. Each rank rounds a sum of its own, where otherwise each further all_reduce
rounds and the sum of the results does. For independent values the expected squared error is the same where two results
were added directly, and about a tenth larger where a residual came between or three become one.

Not in float16, whose largest number is 65504: what two branches have on one rank may exceed it together though both
results and their sum are small. +40000 and +40000 here and -30000 and -30000 there is 20000, and would be infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_core.emit.inserter import Inserter
from fusion_core.lift.algebra import dtype_of, same_shape, same_size, shape_of
from fusion_core.lift.collectives import all_reduces
from fusion_core.lift.readings import Readings
from fusion_core.lift.rules import writers
from fusion_core.lift.term import Term
from fusion_core.reason import Reason
from fusion_core.report.record import Merge

PROVENANCE = "fusion_core.merged"
"""What nodes are marked with that this adds."""

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


OFF = Reason(
    "merge",
    "they could be one: merging is off",
    "the same graphs on all ranks",
    hint="FusionConfig(merge=True) or FUSION_CORE_MERGE=1 merges them",
)
"""Of all_reduces that could be merged and are not. A rank cannot know that the others' graphs have both of them: a
graph break in between on one rank leaves it two all_reduces, with which the one of a merge would pair in silence."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One all_reduce in a tree of additions.

    Attributes:
        anchor: The all_reduce.
        x: What it reduces.
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


def merged(
    graph: fx.Graph, readings: Readings, most: int | None, barred: Callable[[str], Reason | None] = lambda group: None
) -> tuple[Merge, ...]:
    """Merge all_reduces of a graph, ``most`` times at most, and say what came of each group of them.

    Args:
        graph: The graph.
        readings: How other frameworks' operators read.
        most: How many sums may be made; None for all.
        barred: Why those of a process group must stay; None where they need not.
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
            if not reasons and isinstance(group, str) and (reason := barred(group)) is not None:
                reasons = (reason,)
            if not reasons and left == 0:
                reasons = (Reason("limit", f"limit is {most} rewrites", "a higher limit"),)
            if not reasons:
                _apply(graph, own, additions, position)
                left = None if left is None else left - 1
            found.append(Merge(labels, reasons))
        if len(groups) > 1:
            # of each group the last one, which stands whatever was merged
            names = tuple({part.group: part.anchor.name for part in parts}.values())
            words = f"they are of the process groups {', '.join(map(str, groups))}"
            found.append(Merge(names, (Reason("group", words, "one process group"),)))
    return tuple(found)


def mergeable(graph: fx.Graph, readings: Readings) -> tuple[Merge, ...]:
    """The all_reduces of a graph that `merged` would make one, with `OFF` as the reason; changes nothing."""
    found = merged(graph, readings, None, lambda group: OFF)
    return tuple(merge for merge in found if merge.reasons == (OFF,))


def _results(graph: fx.Graph, readings: Readings) -> dict[fx.Node, tuple[fx.Node, Term]]:
    """The node that holds a sum → the all_reduce and its term, of those that can be given another input."""
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
    """The addition that a sum is only a part of; None where it is the whole."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and _is_add(user) and same_shape(shape_of(user), shape_of(node)) else None


def _additions(root: fx.Node) -> Iterator[fx.Node]:
    """The additions that make a sum, the last one first."""
    yield root
    for operand in root.all_input_nodes:
        if _is_add(operand) and _inner(operand) is root:
            yield from _additions(operand)


def _leaves(additions: list[fx.Node]) -> list[fx.Node]:
    """What is added."""
    return [operand for node in additions for operand in node.all_input_nodes if operand not in additions]


def _parts(additions: list[fx.Node], results: Mapping[fx.Node, tuple[fx.Node, Term]]) -> Iterator[_Part]:
    """The all_reduces among what is added."""
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
    """Without those that others are computed from: the residual stream, in every model that begins with a sum."""
    return [
        part
        for part in parts
        if part.alone
        or not any(_hangs_on(each.x, part.anchor, position) for each in parts if each.anchor is not part.anchor)
    ]


def _refusals(parts: list[_Part], additions: list[fx.Node], position: Mapping[fx.Node, int]) -> Iterator[Reason]:
    """Why these all_reduces cannot become one."""
    last, root = parts[-1], additions[0]
    if dtype_of(last.x) is torch.float16:
        words = "the sums are of float16, in which what one rank adds first may overflow"
        yield Reason("dtype", words, "bfloat16 or float32")
    if shared := dict.fromkeys(part.anchor.name for part in parts if not part.alone):
        yield Reason("live_outputs", f"the result of {', '.join(shared)} is used beside the sum", "no other use")
    for part in parts:
        alike = same_shape(shape_of(part.x), shape_of(last.x))
        if not alike and not all(isinstance(size, int) for size in (*shape_of(part.x), *shape_of(last.x))):
            yield Reason("reshape", f"{part.anchor.name} has another shape, known only at run time", "one shape")
        elif not (_same_layout(part.x, last.x) if alike else _is_contiguous(part.x) and _is_contiguous(last.x)):
            yield Reason("layout", f"{part.x.name} has other strides than {last.x.name}", "the same ones", "x")
        if found := _writer(part, last, position):
            yield Reason("mutation", f"{found.name} writes into {part.x.name}", "an input that stays as it is", "x")
    for node in (*additions, *_leaves(additions)):
        # a sum that loses an operand takes the strides of the other, and views behind it were made for its own
        if same_shape(shape_of(node), shape_of(root)) and not _same_layout(node, root):
            yield Reason("layout", f"{node.name} has other strides than {root.name}", "the same ones")


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors of one shape lie alike in memory."""
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
    """A tensor's strides, 0 where the size is 1 and the stride says nothing."""
    return [
        0 if same_size(size, 1) else stride
        for size, stride in zip(shape_of(node), node.meta["val"].stride(), strict=True)
    ]


def _writer(part: _Part, last: _Part, position: Mapping[fx.Node, int]) -> fx.Node | None:
    """What writes into an input after it was to be read and before the one all_reduce that would read it."""
    node = part.x
    while node.op == "call_function" and _is_alias(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]  # a view: others may write into what it views
    between = (user for user in writers(node) if position[part.anchor] < position[user] < position[last.anchor])
    return next(between, None)


def _is_alias(node: fx.Node) -> bool:
    """Whether a node's result is memory of its first argument."""
    returns: Any = getattr(getattr(node.target, "_schema", None), "returns", ())
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
    """The last all_reduce reduces the sum; the others go, and so does each addition of theirs."""
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
        if part.between[-1] is not part.anchor:  # the wait of an all_reduce; another framework's has none
            graph.erase_node(part.anchor)
    for node in reversed(additions):  # a sum with a bias, say, is of the bias's shape where only that is left
        with insert.fake_mode:
            node.meta["val"] = aten.add.Tensor(*fx.map_arg(node.args, lambda arg: arg.meta["val"]))
