"""All-reduces in a graph: the anchors of all sites, and those that must be left alone, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fusion_core.lifting.term import Term
from fusion_core.reason import Reason

c10d = torch.ops._c10d_functional
_WAIT = c10d.wait_tensor.default
_IN_PLACE = (c10d.all_reduce_.default, c10d.all_reduce_coalesced_.default)
_COALESCED = (c10d.all_reduce_coalesced.default, c10d.all_reduce_coalesced_.default)
TARGETS = (c10d.all_reduce.default, *_IN_PLACE, c10d.all_reduce_coalesced.default)


def has_all_reduce(graph: fx.Graph) -> bool:
    """Whether a graph has any all_reduce; looks them up by operator, so that a graph without any costs nothing."""
    return any(graph.find_nodes(op="call_function", target=target, sort=False) for target in TARGETS)


def all_reduces(graph: fx.Graph) -> Iterator[tuple[fx.Node, Term]]:
    """Every all_reduce of a graph in order, as a node and a term."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in TARGETS:
            yield node, _term(node)


def _term(node: fx.Node) -> Term:
    x, op, group = node.args[:3]
    waits = [user for user in node.users if user.target is _WAIT]
    result = waits[0] if waits else node
    return Term("all_reduce", {"x": x, "group": group}, {"reduced": result}, _refusal(node, op, waits))


def _refusal(node: fx.Node, op: object, waits: list[fx.Node]) -> Reason | None:
    if node.target in _COALESCED:
        return Reason("coalesced", "the all_reduce is coalesced with others", "an all_reduce of one tensor")
    if op != "sum":
        return Reason("reduce_op", f"the all_reduce takes the {op}", "sum")
    if len(waits) != 1 or len(node.users) != 1:
        found = f"its result has {len(waits)} waits and {len(node.users)} uses"
        return Reason("wait", found, "one wait_tensor and no other use")
    if node.target in _IN_PLACE and (reason := _writes_elsewhere(node)):
        return reason
    return None


def _writes_elsewhere(node: fx.Node) -> Reason | None:
    """Why an all_reduce that writes into its input cannot be taken for one that does not."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if x.op != "call_function":
        return Reason(
            "mutation",
            f"the all_reduce writes into {x.name}, which comes from outside the graph",
            "an out-of-place all_reduce",
            "x",
        )
    if len(x.users) > 1:
        return Reason(
            "mutation", f"the all_reduce writes into {x.name}, which others use", "an out-of-place all_reduce", "x"
        )
    if any(value.alias_info is not None for value in getattr(getattr(x.target, "_schema", None), "returns", ())):
        return Reason(
            "mutation",
            f"the all_reduce writes into {x.name}, a view of another tensor",
            "an out-of-place all_reduce",
            "x",
        )
    return None
