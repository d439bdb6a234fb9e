"""The lifted graph: a view beside the real graph, which it never changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Meaning, dtype_of, one_element, promoted, same_shape, same_size, shape_of
from fusion_core.lift.aten import RULES, casts, views
from fusion_core.lift.aten.casts import keeps_value
from fusion_core.lift.collectives import all_reduces
from fusion_core.lift.fp8 import fp8_terms, is_quantising_cast, reach
from fusion_core.lift.misses import Misses
from fusion_core.lift.norm import Norm, as_norm, root_of, split_weight
from fusion_core.lift.readings import Readings
from fusion_core.lift.rules import Rule, called, writers
from fusion_core.lift.term import Sum, Term, Unheld
from fusion_core.reason import Reason

Value = fx.Node | Unheld
"""What a term takes or gives: a node, or what no node holds."""

_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)
_FP8_WORDS = frozenset({"quantize_static_fp8", "quantize_token_fp8", "quantize_group_fp8"})


class LiftedGraph:
    """What a graph computes, in the neutral vocabulary: the terms that were found, and how they hang together.

    One pass over the nodes gives each its meaning. Quantisations are looked for behind what a pattern asks about.
    """

    def __init__(self, graph: fx.Graph, readings: Readings) -> None:
        self.graph = graph
        self.readings = readings
        self.anchors: list[tuple[fx.Node, Term]] = list(all_reduces(graph, self.readings))
        self._reduced = {term.results["reduced"] for _, term in self.anchors}
        self._meanings: dict[fx.Node, Meaning] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._terms: dict[Value, list[Term]] = defaultdict(list)
        self._sums: dict[fx.Node, Term] = {}
        self._rounded: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._misses = Misses(self._meanings, self._terms)
        self._unquantised: dict[Value, Reason] = {}
        self._quantised: set[Value] = set()
        self._writers: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._casts_to_eight_bits = False
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
        return self.meaning(node).tensor or self._same.get(node, node)

    @cached_property
    def words(self) -> frozenset[str]:
        """The words that anything in the graph reads as, all_reduce aside."""
        found = frozenset(term.word for terms in self._terms.values() for term in terms)
        return found | _FP8_WORDS if self._casts_to_eight_bits else found

    def terms(self, value: Value, word: str) -> Iterator[Term]:
        """Terms of a word that take ``value`` as an operand; the longest spelling of one expression first."""
        if word.startswith("quantize_"):
            self._look_for_quantisations(value)
        return (term for term in reversed(self._terms[value]) if term.word == word)

    def writers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What writes into a node's memory; found once, as all layers of a model may use one tensor."""
        if node not in self._writers:
            self._writers[node] = tuple(writers(node))
        return self._writers[node]

    def followers(self, value: fx.Node) -> tuple[tuple[str, ...], bool]:
        """What is done with a value behind casts and views that keep it, and whether the graph gives it away.

        Of parts that are cut out only where nothing else is done: the last token is, in every model.
        """
        names: dict[str, None] = {}
        parts: dict[str, None] = {}
        waiting, ends = [value], False
        while waiting:
            for user in waiting.pop(0).users:
                if user.op == "output":
                    ends = True
                elif user.op == "call_function" and self.tensor(user) is value:
                    waiting.append(user)
                else:
                    miss = self._misses.get(user)
                    (parts if miss is not None and miss.code == "part" else names)[called(user)] = None
        return tuple(names or parts), ends

    def near_miss(self, value: Value, word: str) -> Reason | None:
        """What nearly is a word of a value, and is not."""
        if word in _FP8_WORDS:
            return self._unquantised.get(value)
        return self._misses.near(value, word) if isinstance(value, fx.Node) else None

    def _add(self, term: Term) -> None:
        for operand in {id(o): o for o in term.operands.values() if isinstance(o, Value)}.values():
            self._terms[operand].append(term)

    def _lift(self, node: fx.Node) -> None:
        if (terms := self.readings.terms(node)) is not None:
            for term in terms:
                if term.word != "all_reduce":
                    self._add(self._normal(term))
            return
        self._casts_to_eight_bits |= is_quantising_cast(node)
        rule = _rule(node)
        meaning = rule(node, self.meaning) if rule is not None else None
        if isinstance(meaning, Meaning):
            self._meanings[node] = meaning
            if (source := _source(node)) is not None and keeps_value(node, source):
                self._same[node] = self._same.get(source, source)
            else:
                self._lift_norm(node, meaning)
            return
        if isinstance(meaning, Reason):
            self._misses[node] = meaning
        if node.target in _ADDS:
            self._lift_add(node)
        elif (source := _source(node)) is not None:
            self._lift_rounding(node, self.tensor(source))

    def _normal(self, term: Term) -> Term:
        """A dialect's term with its operands behind casts and views, and a constant of the weight in weight_bias."""
        operands = {name: self.tensor(o) if isinstance(o, fx.Node) else o for name, o in term.operands.items()}
        weight, added = operands.get("weight"), operands.get("weight_bias")
        if isinstance(weight, fx.Node) and isinstance(added, int | float):
            tensor, bias = split_weight(self.meaning(weight).sole)
            if tensor is not None and self.meaning(weight).coefficient == 1.0:
                operands |= {"weight": tensor, "weight_bias": added + bias}
        return Term(term.word, operands, term.results, term.refusal, term.notes)

    def _lift_norm(self, node: fx.Node, meaning: Meaning) -> None:
        norm = as_norm(meaning) if len(meaning.factors) > 1 else None
        if isinstance(norm, Reason):
            self._misses[node] = norm
        if not isinstance(norm, Norm) or not _same_rows(node, norm.base):
            return
        notes = {} if norm.weight is None else {"weight_after_cast": self._rounds_before(node)}
        self._add(self._norm(node, norm, norm.base, notes))
        for rounded in self._rounded[norm.base]:
            self._add(self._norm(node, norm, rounded, notes | {"norm_of_unrounded_sum": True}))

    def _norm(self, node: fx.Node, norm: Norm, base: fx.Node, notes: dict[str, Any]) -> Term:
        dtype = dtype_of(node)
        operands = {
            "x": base,
            "weight": norm.weight,
            "eps": norm.eps,
            "weight_bias": norm.weight_bias,
            "dtype": None if dtype == dtype_of(base) else dtype,
        }
        return Term("rms_norm", operands, {"normed": node}, notes=notes)

    def _rounds_before(self, node: fx.Node) -> bool:
        """Whether a product is rounded to 16 bits before its last factor: the rest of a norm before its weight."""
        while (source := _source(node)) is not None:
            node = source
        for operand in node.args[:2]:
            meaning = self._meanings.get(operand) if isinstance(operand, fx.Node) else None
            if meaning is None or meaning.row is not None or not any(root_of(atom) for atom, _ in meaning.factors):
                continue
            assert isinstance(operand, fx.Node)
            while True:
                if _is_short(operand):
                    return True
                if (source := _source(operand)) is None:
                    break
                operand = source
            if self._rounds_before(operand):
                return True
        return False

    def _lift_add(self, node: fx.Node) -> None:
        left, right = node.args[:2]
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            return
        for operand in (left, right):
            if not same_shape(shape_of(operand), shape_of(node)):
                if not one_element(operand) and node not in self._misses:
                    shape, whole = (", ".join(map(str, shape_of(n))) for n in (operand, node))
                    found = f"{operand.name}, of shape [{shape}], is broadcast by {node.name}"
                    self._misses[node] = Reason("broadcast", found, f"the shape [{whole}]", "residual")
                return
        a, b = self.meaning(left), self.meaning(right)
        # a scaled tensor that the model goes on using is a value like any other
        a, b = (
            Meaning.of(n) if m.coefficient != 1.0 and m.multiple not in self._reduced and len(n.users) > 1 else m
            for n, m in ((left, a), (right, b))
        )
        x, residual = (
            n if _same_rows(operand, n := m.multiple or self.tensor(operand)) else operand
            for operand, m in ((left, a), (right, b))
        )
        refusal = None
        if node.target is torch.ops.aten.sub.Tensor:
            refusal = Reason("scaled", f"one side of {node.name} is scaled by -1", "the sum as it is")
        elif node.kwargs.get("alpha", 1) != 1:
            refusal = Reason("scaled", f"{node.name} adds with alpha {node.kwargs['alpha']}", "alpha 1")
        elif scaled := next((m for m in (a, b) if m.multiple is not None and m.coefficient != 1.0), None):
            refusal = Reason(
                "scaled", f"one side of {node.name} is scaled by {scaled.coefficient:g}", "the sum as it is"
            )
        operands = {"x": x, "residual": residual, "dtype": _sum_dtype(node, x, residual)}
        term = Term("add", operands, {"sum": node}, refusal)
        self._sums[node] = term
        if refusal is None:
            for inner, other in ((x, residual), (residual, x)):
                self._lift_second_add(node, inner, other)
        self._add(term)

    def _lift_second_add(self, node: fx.Node, inner: fx.Node, other: fx.Node) -> None:
        """``(a + b) + c`` as ``a + (b + c)``, where ``a`` comes from an all_reduce and nothing else uses ``a + b``."""
        first = self._sums.get(inner)
        if first is None or first.refusal is not None or not self._leads_only_to(inner, node):
            return
        a, b = first.operands["x"], first.operands["residual"]
        if other in self._reduced or len({dtype_of(n) for n in (a, b, inner, other, node)}) > 1:
            return  # where c comes from an all_reduce too, that one takes the sum as it is spelled
        reduced = max((n for n in (a, b) if n in self._reduced), key=self.position.__getitem__, default=None)
        if reduced is not None:
            operands = {"x": reduced, "residual": Sum(b if reduced is a else a, other, inner), "dtype": None}
            self._add(Term("add", operands, {"sum": node}, notes={"reassociated": True}))

    def _leads_only_to(self, node: fx.Node, target: fx.Node) -> bool:
        users = list(node.users)
        while users:
            user = users.pop()
            if user is target:
                continue
            if user.op != "call_function" or self.tensor(user) is not node:
                return False
            users += user.users
        return True

    def _lift_rounding(self, node: fx.Node, source: fx.Node) -> None:
        """A sum that is rounded: the sum of that dtype, and whatever is normed of the unrounded one nearly is of it."""
        exact = self._sums.get(source)
        if exact is None or not same_shape(shape_of(node), shape_of(source)):
            return
        x, residual = exact.operands["x"], exact.operands["residual"]
        operands = {"x": x, "residual": residual, "dtype": _sum_dtype(node, x, residual)}
        self._add(Term("add", operands, {"sum": node}, exact.refusal))
        self._rounded[source].append(node)
        for term in [term for term in self._terms[source] if term.word == "rms_norm"]:
            normed = term.results["normed"]
            assert isinstance(normed, fx.Node)
            dtype = dtype_of(normed)
            of_rounded = term.operands | {"x": node, "dtype": None if dtype == dtype_of(node) else dtype}
            self._add(Term("rms_norm", of_rounded, term.results, notes=term.notes | {"norm_of_unrounded_sum": True}))

    def _look_for_quantisations(self, value: Value) -> None:
        """Find the quantisations of a value that are spelled out, and refuse all where there are several."""
        if value in self._quantised:
            return
        self._quantised.add(value)
        casts: list[fx.Node] = []
        if self._casts_to_eight_bits and isinstance(value, fx.Node):
            reached = reach(value, self.position, _rule, self.meaning)
            casts = reached.casts
            for found in fp8_terms(reached):
                if isinstance(found, Reason):
                    self._unquantised[value] = found
                else:
                    self._add(found)
        terms = [term for term in self._terms[value] if term.word.startswith("quantize_")]
        twins = {node for term in terms for node in term.twins}
        codes = {term.results.get("quantized") for term in terms} | (set(casts) - twins)
        if len(codes) > 1:
            refusal = Reason("quantised", f"{value} is quantised {len(codes)} times", "one quantisation")
            self._terms[value] = [
                Term(t.word, t.operands, t.results, refusal) if t in terms else t for t in self._terms[value]
            ]


def _rule(node: fx.Node) -> Rule | None:
    rule = RULES.get(node.target)
    if rule is None or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    plain = (fx.Node, int, float, list, tuple, torch.dtype, type(None))
    return rule if all(isinstance(argument, plain) for argument in node.args) else None


_WITH_ONE_SOURCE = {
    target: 1 if target is torch.ops.aten.copy.default else 0
    for target in (*casts.RULES, *views.RESHAPES)
    if target is not torch.ops.aten.full.default
}


def _source(node: fx.Node) -> fx.Node | None:
    """What a cast, a copy or a reshape is made of."""
    index = _WITH_ONE_SOURCE.get(node.target)
    source = node.args[index] if index is not None else None
    return source if isinstance(source, fx.Node) else None


def _same_rows(node: fx.Node, base: fx.Node) -> bool:
    """Whether a node has the last dimension and as many elements as another."""
    a, b = shape_of(node), shape_of(base)
    return bool(a and b) and same_size(a[-1], b[-1]) and (same_shape(a, b) or same_size(_numel(node), _numel(base)))


def _numel(node: fx.Node) -> Any:
    return node.meta["val"].numel()


def _is_short(node: fx.Node) -> bool:
    return dtype_of(node) in (torch.bfloat16, torch.float16)


def _sum_dtype(node: fx.Node, x: Value, residual: Value) -> torch.dtype | None:
    """The dtype of a sum where it is not the one that torch's promotion gives."""
    dtypes = [dtype_of(operand) for operand in (x, residual) if isinstance(operand, fx.Node)]
    usual = promoted(dtypes[0], dtypes[-1])
    return None if (dtype := dtype_of(node)) == usual else dtype
