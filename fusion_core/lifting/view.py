"""The lifted graph: a view beside the real graph, which it never changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fusion_core.lifting.aten import RULES
from fusion_core.lifting.collectives import all_reduces
from fusion_core.lifting.dialect import Dialect
from fusion_core.lifting.meaning import Meaning, as_norm, dtype_of, same_shape, same_size, shape_of
from fusion_core.lifting.readings import Readings
from fusion_core.lifting.term import Term
from fusion_core.reason import Reason

_ADDS = (torch.ops.aten.add.Tensor,)


class LiftedGraph:
    """What a graph computes, in the neutral vocabulary: the terms that were found, and how they hang together.

    One pass over the nodes gives each its meaning; a word is looked for only where an all_reduce's result can reach.
    """

    def __init__(self, graph: fx.Graph, dialects: Iterable[Dialect] = ()) -> None:
        self.graph = graph
        self.anchors: list[tuple[fx.Node, Term]] = list(all_reduces(graph))
        self._meanings: dict[fx.Node, Meaning] = {}
        self._terms: dict[fx.Node, list[Term]] = defaultdict(list)
        self.readings = Readings(dialects)
        for node in graph.nodes:
            if node.op == "call_function":
                self._lift(node)

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Where each node stands in the graph."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    def meaning(self, argument: Any) -> Meaning:
        """What a node or a number is."""
        if isinstance(argument, fx.Node):
            return self._meanings.get(argument) or Meaning.of(argument)
        if isinstance(argument, int | float):
            return Meaning.constant(argument)
        raise TypeError(f"an argument is {argument!r}, needs a node or a number")

    def tensor(self, node: fx.Node) -> fx.Node:
        """The node whose value ``node`` has, behind casts and views that change nothing."""
        return self.meaning(node).tensor or node

    @cached_property
    def words(self) -> frozenset[str]:
        """The words that anything in the graph reads as, all_reduce aside."""
        return frozenset(term.word for terms in self._terms.values() for term in terms)

    def terms(self, value: fx.Node, word: str) -> Iterator[Term]:
        """Terms of a word that take ``value`` as an operand; the longest spelling of one expression first."""
        return (term for term in reversed(self._terms[value]) if term.word == word)

    def _add(self, term: Term) -> None:
        for operand in {id(o): o for o in term.operands.values() if isinstance(o, fx.Node)}.values():
            self._terms[operand].append(term)

    def _lift(self, node: fx.Node) -> None:
        if (terms := self.readings.terms(node)) is not None:
            for term in terms:
                operands = {name: self.tensor(o) if isinstance(o, fx.Node) else o for name, o in term.operands.items()}
                self._add(Term(term.word, operands, term.results, term.refusal))
            return
        rule = RULES.get(node.target)
        meaning = rule(node, self.meaning) if rule is not None and _readable(node) else None
        if meaning is not None:
            self._meanings[node] = meaning
            self._lift_norm(node, meaning)
        elif node.target in _ADDS:
            self._lift_add(node)

    def _lift_norm(self, node: fx.Node, meaning: Meaning) -> None:
        norm = as_norm(meaning) if len(meaning.factors) in (2, 3) else None
        if norm is None or not same_size(shape_of(node)[-1], shape_of(norm.base)[-1]):
            return
        dtype = dtype_of(node)
        operands = {
            "x": norm.base,
            "weight": norm.weight,
            "eps": norm.eps,
            "weight_bias": norm.weight_bias,
            "dtype": None if dtype == dtype_of(norm.base) else dtype,
        }
        self._add(Term("rms_norm", operands, {"normed": node}))

    def _lift_add(self, node: fx.Node) -> None:
        left, right = node.args[:2]
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return
        if not (same_shape(shape_of(left), shape_of(node)) and same_shape(shape_of(right), shape_of(node))):
            return
        a, b = self.meaning(left), self.meaning(right)
        x, residual = a.tensor or _scaled_tensor(a) or left, b.tensor or _scaled_tensor(b) or right
        refusal = None
        if node.kwargs.get("alpha", 1) != 1:
            refusal = Reason("scaled", f"{node.name} adds with alpha {node.kwargs['alpha']}", "alpha 1")
        elif scaled := next((m for m in (a, b) if _scaled_tensor(m)), None):
            refusal = Reason(
                "scaled", f"one side of {node.name} is scaled by {scaled.coefficient:g}", "the sum as it is"
            )
        promoted = torch.promote_types(dtype_of(x), dtype_of(residual))  # type: ignore[arg-type]
        dtype = dtype_of(node)
        operands = {"x": x, "residual": residual, "dtype": None if dtype == promoted else dtype}
        self._add(Term("add", operands, {"sum": node}, refusal))


def _scaled_tensor(meaning: Meaning) -> fx.Node | None:
    """The tensor that a meaning is a multiple of."""
    return Meaning(meaning.factors).tensor if meaning.coefficient != 1.0 else None


def _readable(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and all(
        isinstance(argument, fx.Node | int | float | list | tuple | torch.dtype | None) for argument in node.args
    )
