"""torch's functional collectives: the nodes that are an all_reduce, and the reasons why some must not be fused."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from fusion_core._torch.operators import schema_of
from fusion_core.lift.rules import is_cheap
from fusion_core.lift.term import Term
from fusion_core.reason import Reason

c10d = torch.ops._c10d_functional
_WAIT = c10d.wait_tensor.default
_IN_PLACE = (c10d.all_reduce_.default, c10d.all_reduce_coalesced_.default)
COALESCED = (c10d.all_reduce_coalesced.default, c10d.all_reduce_coalesced_.default)
TARGETS = (c10d.all_reduce.default, *_IN_PLACE, c10d.all_reduce_coalesced.default)
SCATTERS = (c10d.reduce_scatter_tensor.default,)
_GATHERS = (c10d.all_gather_into_tensor.default, c10d.all_gather_into_tensor_out.default)
_NEAR = 60  # nodes to search after a reduce_scatter for its all_gather


def terms(node: fx.Node) -> Iterator[tuple[fx.Node, Term]]:
    """The all_reduces in a node, each with its anchor node."""
    if node.target in COALESCED:
        yield from _coalesced(node)
    elif node.target in TARGETS:
        x, op, group = node.args[:3]
        yield _anchor(node, x, op, group, _written_elsewhere(node, x) if node.target in _IN_PLACE else None)
    elif node.target in SCATTERS and (gather := _gather(node)) is not None:
        found = f"{node.name} (reduce_scatter) spreads the sum over the ranks and {gather.name} (all_gather) gathers it"
        refusal = Reason("reduce_scatter", found, "one all_reduce")
        operands = {"x": node.args[0], "group": node.args[3]}
        yield node, Term("all_reduce", operands, {"reduced": node}, refusal)


def _coalesced(node: fx.Node) -> Iterator[tuple[fx.Node, Term]]:
    """One all_reduce for each tensor that is used."""
    inputs, op, group = node.args[:3]
    assert isinstance(inputs, list | tuple)
    for part in node.users:
        if part.target is not operator.getitem:
            reason = Reason("coalesced", f"{node.name} is used as a whole by {part.name}", "uses of its parts")
            yield node, Term("all_reduce", {"x": inputs[0], "group": group}, {"reduced": node}, reason)
            return
    for part in node.users:
        index = part.args[1]
        assert isinstance(index, int)
        refusal = None
        if node.target in _IN_PLACE:
            found = f"{node.name} writes into several tensors"
            refusal = Reason("mutation", found, "an out-of-place all_reduce", "x")
        anchor, term = _anchor(part, inputs[index], op, group, refusal)
        if len(inputs) > 1:  # taking one of them out adds a collective, which must be worth it
            term.notes["collective"] = "_c10d_functional::all_reduce_coalesced"
        yield anchor, term


def _anchor(node: fx.Node, x: object, op: object, group: object, refusal: Reason | None) -> tuple[fx.Node, Term]:
    waits = [user for user in node.users if user.target is _WAIT]
    if op != "sum":
        refusal = Reason("reduce_op", f"the all_reduce takes the {op}", "sum")
    elif len(waits) != 1 or len(node.users) != 1:
        found = f"its result has {len(waits)} waits and {len(node.users)} uses"
        refusal = Reason("wait", found, "one wait_tensor and no other use")
    return node, Term("all_reduce", {"x": x, "group": group}, {"reduced": waits[0] if waits else node}, refusal)


def _written_elsewhere(node: fx.Node, x: object) -> Reason | None:
    """The reason why an in-place all_reduce cannot be treated as one that does not write into its input, or None."""
    assert isinstance(x, fx.Node)
    found = None
    if x.op != "call_function":
        found = f"the all_reduce writes into {x.name}, which comes from outside the graph"
    elif len(x.users) > 1:
        found = f"the all_reduce writes into {x.name}, which others use"
    elif any(value.alias_info is not None for value in getattr(schema_of(x.target), "returns", ())):
        found = f"the all_reduce writes into {x.name}, a view of another tensor"
    return Reason("mutation", found, "an out-of-place all_reduce", "x") if found else None


def _gather(scatter: fx.Node) -> fx.Node | None:
    """The all_gather in the same group of a reduce_scatter's result, possibly after cheap arithmetic."""
    waiting, seen = list(scatter.users), dict.fromkeys(scatter.users)
    while waiting and len(seen) < _NEAR:
        node = waiting.pop(0)
        if node.target in _GATHERS and scatter.args[3] in node.args:
            return node
        if node.target is not _WAIT and not is_cheap(node):
            continue
        more = [user for user in node.users if user not in seen and user.op == "call_function"]
        waiting += more
        seen |= dict.fromkeys(more)
    return None
