"""All-reduces in a graph, torch's and other frameworks': the anchors of all sites."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fusion_core._torch.operators import schema_of
from fusion_core.lift import c10d_functional
from fusion_core.lift.algebra import dtype_of
from fusion_core.lift.c10d_functional import TARGETS
from fusion_core.lift.operator_call import WRAPPERS
from fusion_core.lift.readings import Readings
from fusion_core.lift.term import Term
from fusion_core.reason import Reason

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def has_all_reduce(graph: fx.Graph, readings: Readings | None = None) -> bool:
    """Whether a graph has any node that may be an all_reduce."""
    return next(_candidates(graph, readings), None) is not None


def all_reduces(graph: fx.Graph, readings: Readings | None = None) -> Iterator[tuple[fx.Node, Term]]:
    """Every all_reduce of a graph in order, as a node and a term: torch's own, and operators that read as one."""
    for node in sorted(_candidates(graph, readings)):
        found: Iterable[tuple[fx.Node, Term]] = c10d_functional.terms(node)
        if readings is not None and readings.collectives and (terms := readings.terms(node)) is not None:
            found = ((node, term) for term in terms if term.word == "all_reduce")
        for anchor, term in found:
            yield anchor, _of_floats(term)


def _candidates(graph: fx.Graph, readings: Readings | None) -> Iterator[fx.Node]:
    """The nodes that may be an all_reduce. They are looked up by operator: a graph has many nodes and few of these."""
    others = _operators(readings.collectives) if readings is not None else ()
    for target in dict.fromkeys((*TARGETS, *c10d_functional.SCATTERS, *others)):
        yield from graph.find_nodes(op="call_function", target=target, sort=False)


def _of_floats(term: Term) -> Term:
    """The term, refused if it does not sum float16, bfloat16 or float32."""
    x = term.operands["x"]
    dtype = dtype_of(x) if isinstance(x, fx.Node) else None
    if term.refusal is not None or dtype in FLOATS:
        return term
    found = f"the all_reduce is of {str(dtype).removeprefix('torch.')}"
    return replace(term, refusal=Reason("dtype", found, "float16, bfloat16 or float32", "x"))


def _operators(names: Iterable[str]) -> Iterator[Any]:
    """The targets of nodes that apply the operators of these names, as far as the operators exist."""
    for name in names:
        namespace, _, operator = name.partition("::")
        operator, _, overload = operator.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        for each in packet.overloads() if packet is not None else ():
            if overload in ("", each):
                target = getattr(packet, each)
                # one that writes into its argument is inside a wrapper, which any operator may be in
                yield from WRAPPERS if schema_of(target).is_mutable else (target,)


__all__ = ["TARGETS", "all_reduces", "has_all_reduce"]
