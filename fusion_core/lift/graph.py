"""The lifted graph: a view of the real graph, which it never changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Biased, Product, dtype_of, same_shape, shape_of
from fusion_core.lift.aten import RULES, casts, views
from fusion_core.lift.aten.casts import keeps_value
from fusion_core.lift.collectives import all_reduces
from fusion_core.lift.fp8 import fp8_terms, is_quantising_cast, reach
from fusion_core.lift.gathers import Gathers
from fusion_core.lift.misses import NORMS, Misses
from fusion_core.lift.norm import Norm, as_layer_norm_takes_it, as_norm, root_of, split_weight
from fusion_core.lift.readings import Readings
from fusion_core.lift.rules import Rule, called, writers
from fusion_core.lift.sharded import Sharded
from fusion_core.lift.sums import ADDS, Sums, same_rows, sum_dtype
from fusion_core.lift.term import Term, Virtual
from fusion_core.reason import Reason

Value = fx.Node | Virtual
"""An operand or result of a term: a node, or a value without a node."""

_FP8_WORDS = frozenset({"quantize_static_fp8", "quantize_token_fp8", "quantize_group_fp8"})


class LiftedGraph:
    """What a graph computes, in the neutral vocabulary: the terms found in it, and how they are connected.

    One pass over the nodes computes each one's product of powers. Quantisations are searched only if a pattern needs
    them.
    """

    def __init__(self, graph: fx.Graph, readings: Readings) -> None:
        self.graph = graph
        self.readings = readings
        self.anchors: list[tuple[fx.Node, tuple[Term, ...]]] = [
            (node, (term,)) for node, term in all_reduces(graph, self.readings)
        ]
        self._reduced = {term.results["reduced"] for _, (term,) in self.anchors}
        gathers = Gathers(graph)
        self._sharded = Sharded(graph, gathers) if gathers else None
        self._products: dict[fx.Node, Product] = {}
        self._same: dict[fx.Node, fx.Node] = {}
        self._terms: dict[Value, list[Term]] = defaultdict(list)
        self._rounded: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._misses = Misses(self._products, self._terms)
        self._sums = Sums(self._reduced, self.product, self.tensor, lambda: self.position, self._misses)
        self._unquantised: dict[Value, Reason] = {}
        self._quantised: set[Value] = set()
        self._writers: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._casts_to_eight_bits = False
        for node in graph.nodes:
            if node.op == "call_function":
                self._lift(node)
        if self._sharded is not None:
            self.anchors += self._sharded.anchors()
            self.anchors.sort(key=lambda anchor: self.position[anchor[0]])

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Each node's index in the graph."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    def product(self, argument: Any) -> Product:
        """The product that a node or a number is."""
        if isinstance(argument, fx.Node):
            return self._products.get(argument) or Product.of(argument)
        if isinstance(argument, int | float):
            return Product.constant(argument)
        raise TypeError(f"an argument is {argument!r}, needs a node or a number")

    def tensor(self, node: fx.Node) -> fx.Node:
        """The node that ``node`` has its value from, before casts and views that change nothing."""
        return self.product(node).tensor or self._same.get(node, node)

    @cached_property
    def words(self) -> frozenset[str]:
        """The words found in the graph or nearly found, except all_reduce."""
        found = frozenset(term.word for terms in self._terms.values() for term in terms)
        found |= self._misses.words
        return found | _FP8_WORDS if self._casts_to_eight_bits else found

    def terms(self, value: Value, word: str) -> Iterator[Term]:
        """Terms of a word that take ``value`` as an operand, the longest spelling of an expression first."""
        if word.startswith("quantize_"):
            self._look_for_quantisations(value)
        return (term for term in reversed(self._terms[value]) if term.word == word)

    def writers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that write into a node's memory; cached, since all layers of a model may use one tensor."""
        if node not in self._writers:
            self._writers[node] = tuple(writers(node))
        return self._writers[node]

    def followers(self, value: fx.Node) -> tuple[tuple[str, ...], bool]:
        """The operations on a value, looking through casts and views that keep it, and whether the graph returns it.

        Slices are listed only if there is nothing else: every model slices off the last token.
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
        """The reason why an expression close to a word of a value is not that word, if there is one."""
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
        if self._sharded is not None and (gather := self._sharded.own_part(node)) is not None:
            part = self.tensor(gather.x)
            self._products[node], self._same[node] = Product.of(part), part
            return
        self._casts_to_eight_bits |= is_quantising_cast(node)
        rule = _rule(node)
        product = rule(node, self.product) if rule is not None else None
        if isinstance(product, Product):
            self._products[node] = product
            if (source := _source(node)) is not None and keeps_value(node, source):
                self._same[node] = self._same.get(source, source)
            else:
                self._lift_norm(node, product)
            return
        if isinstance(product, Reason):
            self._misses[node] = product
        if node.target in ADDS:
            for term in self._sums.read(node):
                self._add(term)
        elif (source := _source(node)) is not None:
            self._lift_rounding(node, self.tensor(source))

    def _normal(self, term: Term) -> Term:
        """A dialect's term with operands before casts and views, and a constant in the weight moved to weight_bias."""
        operands = {name: self.tensor(o) if isinstance(o, fx.Node) else o for name, o in term.operands.items()}
        weight, added = operands.get("weight"), operands.get("weight_bias")
        if isinstance(weight, fx.Node) and isinstance(added, int | float):
            tensor, bias = split_weight(self.product(weight).single_factor)
            if tensor is not None and self.product(weight).coefficient == 1.0:
                operands |= {"weight": tensor, "weight_bias": added + bias}
        return Term(term.word, operands, term.results, term.refusal, term.notes)

    def _lift_norm(self, node: fx.Node, product: Product) -> None:
        whole = len(product.factors) > 1 or isinstance(product.single_factor, Biased)
        norm = as_norm(product, self._part_of) if whole else as_layer_norm_takes_it(node, product)
        if isinstance(norm, Reason):
            self._misses[node] = norm
        if not isinstance(norm, Norm) or not same_rows(node, norm.base):
            return
        notes = {} if norm.weight is None else {"weight_after_cast": self._rounds_before(node)}
        if norm.whole is not None:
            self._add(self._norm_of_part(node, norm, norm.whole, notes))
            return
        if self._sharded is not None:
            self._sharded.normed_whole(norm.base, node)
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
        if norm.centred:
            operands["bias"] = norm.bias
        return Term(norm.word, operands, {"normed": node}, notes=notes)

    def _part_of(self, whole: fx.Node) -> fx.Node | None:
        if self._sharded is None:
            return None
        if (gather := self._sharded.whole(whole)) is not None:
            return self.tensor(gather.x)
        self._sharded.refuse(whole)
        return None

    def _norm_of_part(self, node: fx.Node, norm: Norm, whole: fx.Node, notes: dict[str, Any]) -> Term:
        """The norm of the rank's part of a gathered vector."""
        assert self._sharded is not None
        gather = self._sharded.whole(whole)
        assert gather is not None
        given = self._norm(node, norm, norm.base, notes)
        operands = given.operands | {"x": gather.x, "mean_square": self._sharded.square(gather)}
        return Term("scale_by_rms", operands, given.results, notes=notes)

    def _rounds_before(self, node: fx.Node) -> bool:
        """Whether a product is rounded to 16 bits before its last factor: a norm before its weight is applied."""
        while (source := _source(node) or self._unbiased(node)) is not None:
            node = source
        for operand in node.args[:2]:
            product = self._products.get(operand) if isinstance(operand, fx.Node) else None
            if product is None or product.row is not None or not any(root_of(atom) for atom, _ in product.factors):
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

    def _unbiased(self, node: fx.Node) -> fx.Node | None:
        """The LayerNorm to which a node adds a bias."""
        product = self._products.get(node)
        if product is None or not isinstance(biased := product.single_factor, Biased):
            return None
        return next((operand for operand in node.all_input_nodes if self.product(operand) == biased.term), None)

    def _lift_rounding(self, node: fx.Node, source: fx.Node) -> None:
        """Record a cast of a sum as a sum in the narrower dtype.

        A norm of the unrounded sum is then also recorded as a norm of the rounded one, marked norm_of_unrounded_sum.
        """
        exact = self._sums.pair(source)
        if exact is None or not same_shape(shape_of(node), shape_of(source)):
            return
        x, residual = exact.operands["x"], exact.operands["residual"]
        operands = {"x": x, "residual": residual, "dtype": sum_dtype(node, x, residual)}
        self._add(Term("add", operands, {"sum": node}, exact.refusal))
        self._rounded[source].append(node)
        for term in [term for term in self._terms[source] if term.word in NORMS]:
            normed = term.results["normed"]
            assert isinstance(normed, fx.Node)
            dtype = dtype_of(normed)
            of_rounded = term.operands | {"x": node, "dtype": None if dtype == dtype_of(node) else dtype}
            self._add(Term(term.word, of_rounded, term.results, notes=term.notes | {"norm_of_unrounded_sum": True}))

    def _look_for_quantisations(self, value: Value) -> None:
        """Find the quantisations of a value that are written in plain torch, and refuse all if there are several."""
        if value in self._quantised:
            return
        self._quantised.add(value)
        casts: list[fx.Node] = []
        if self._casts_to_eight_bits and isinstance(value, fx.Node):
            reached = reach(value, self.position, _rule, self.product)
            casts = reached.casts
            for found in fp8_terms(reached):
                if isinstance(found, Reason):
                    self._unquantised[value] = found
                else:
                    self._add(found)
        terms = [term for term in self._terms[value] if term.word.startswith("quantize_")]
        duplicates = {node for term in terms for node in term.duplicates}
        codes = {term.results.get("quantized") for term in terms} | (set(casts) - duplicates)
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
    """The input of a cast, a copy or a reshape."""
    index = _WITH_ONE_SOURCE.get(node.target)
    source = node.args[index] if index is not None else None
    return source if isinstance(source, fx.Node) else None


def _is_short(node: fx.Node) -> bool:
    return dtype_of(node) in (torch.bfloat16, torch.float16)
