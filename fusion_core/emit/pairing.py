"""How a graph's collectives pair with other ranks': plain all_reduces always, kernels only after agreement."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_core._torch.operators import HigherOrderOperator, OpOverload, schema_of
from fusion_core.agree.kernel_calls import Calls
from fusion_core.dispatch.by_tokens import NAMES
from fusion_core.dispatch.plan import Plan
from fusion_core.patterns.definition import GROUP
from fusion_core.site import dtype_name

PROVENANCE = "fusion_core"
"""The key in ``node.meta`` for the name of the strategy that a node came from."""
SITE = "fusion_core.site"
"""The key in ``node.meta`` for the label of the all_reduce that a node came from."""

_GROUPS = ("group", "group_name", "process_group")
"""Argument names by which operators take the name of a process group."""

c10d = torch.ops._c10d_functional


def is_collective(node: fx.Node) -> bool:
    """Whether a node is collective: one of torch's, a strategy's operator, or another one that names a group."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, HigherOrderOperator):
        return PROVENANCE in node.meta
    if not isinstance(node.target, OpOverload) or node.target.namespace in ("aten", "prims"):
        return False
    if node.target.namespace == c10d.name:
        return node.target is not c10d.wait_tensor.default
    return PROVENANCE in node.meta or any(argument.name in _GROUPS for argument in schema_of(node.target).arguments)


def is_plain(traced: fx.GraphModule) -> bool:
    """Whether other ranks see a traced strategy as one all_reduce of a tensor with x's dtype and size.

    Any operator that is not torch's own may communicate.
    """
    nodes = [node for node in traced.graph.nodes if node.op == "call_function"]
    if any(isinstance(n.target, HigherOrderOperator) for n in nodes):
        return False
    overloads = [node for node in nodes if isinstance(node.target, OpOverload)]
    if any(node.target.namespace not in ("aten", "prims", c10d.name) for node in overloads):
        return False
    collectives = [node for node in overloads if is_collective(node)]
    if len(collectives) != 1 or collectives[0].target is not c10d.all_reduce.default:
        return False
    reduced, op = collectives[0].args[:2]
    assert isinstance(reduced, fx.Node)
    x = next(node for node in traced.graph.nodes if node.op == "placeholder")
    return op == "sum" and _form(reduced) == _form(x)


def _form(node: fx.Node) -> tuple[torch.dtype, str]:
    value = node.meta["val"]
    return value.dtype, str(value.numel())


@dataclass(frozen=True)
class _Call:
    """One collective: the text that ranks compare, and for messages the kernel and its all_reduce."""

    group: str
    text: str
    kernel: str = ""


def seal(graph: fx.Graph) -> None:
    """Give each kernel of a graph the sequence of collectives of its group."""
    kernels = [(node, plan) for node in graph.nodes if (plan := plan_of(node)) is not None]
    if not kernels:
        return
    calls = [call for node in graph.nodes if is_collective(node) for call in _calls(node)]
    found: dict[str, str] = {}
    for node, plan in kernels:
        group = plan.scalars[GROUP]
        if group not in found:
            own = [call for call in calls if call.group == group]
            texts = _same_symbols([call.text for call in own])
            found[group] = Calls.of(texts, _words([call.kernel for call in own])).text()
        node.update_kwarg("calls", found[group])


def _words(kernels: Sequence[str]) -> str:
    named = [kernel for kernel in kernels if kernel]
    some = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    count = f"{len(kernels)} collective{'s' * (len(kernels) != 1)}"
    return f"a graph of {count} with {some}"


def plan_of(node: fx.Node) -> Plan | None:
    """The plan of a node that calls a kernel through `fusion_core.dispatch.by_tokens`; None for another node."""
    if not isinstance(node.target, HigherOrderOperator) or not node.args:
        return None
    inner = node.args[0]
    ours = isinstance(inner, OpOverload) and inner.name().partition(".")[0] in NAMES
    return Plan.of(str(node.kwargs["plan"])) if ours else None


def _calls(node: fx.Node) -> Iterator[_Call]:
    if (plan := plan_of(node)) is not None:
        kernel = f"{node.meta[PROVENANCE]} at {node.meta.get(SITE, node.name)}"
        yield _Call(plan.scalars[GROUP], f"{plan.without_group().text()} {_tensors(node.kwargs['x'])}", kernel)
        return
    for group in _groups(node):
        yield _Call(group, f"{node.target} {_tensors(node.args)} {_constants(node)}")


def _groups(node: fx.Node) -> Iterator[str]:
    """The groups that a collective's arguments name."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in schema_of(node.target).arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    yield from (value for name in _GROUPS if isinstance(value := given.get(name), str))


def _constants(node: fx.Node) -> str:
    """A collective's arguments except tensors and groups, such as the reduction."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in schema_of(node.target).arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return str({n: v for n, v in given.items() if isinstance(v, str | int | float) and n not in (*_GROUPS, "tag")})


def _tensors(argument: Any) -> str:
    values: list[str] = []

    def add(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            values.append(f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]")
        return node

    fx.map_arg(argument, add)
    return " ".join(values)


def _same_symbols(texts: Sequence[str]) -> list[str]:
    """The texts with symbols renumbered in order of appearance, since each rank numbers them over its whole graph."""
    known: dict[str, str] = {}
    rename = re.compile(r"\b[su]\d+\b")
    return [rename.sub(lambda found: known.setdefault(found[0], f"n{len(known)}"), text) for text in texts]
