"""Near misses: expressions near a value that are close to a word but are not that word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Function, Product
from fusion_core.lift.norm import is_of_layer_norm
from fusion_core.lift.term import Term
from fusion_core.reason import Reason

NORMS = ("rms_norm", "layer_norm")
_CONCERNS = {
    "add": (("broadcast",), ("part",)),
    "rms_norm": (
        ("mean", "reduction", "root", "eps", "scaled", "weight"),
        ("part", "heads", "rounded", "maximum"),
        ("factor",),
    ),
    "layer_norm": (
        ("variance", "reduction", "root", "eps", "scaled", "weight"),
        ("part", "heads", "rounded"),
        ("factor",),
    ),
}
"""Codes of the near misses of a word, the most informative first."""
_OF_ONE_NORM = ("root", "eps", "scaled", "weight")
"""Codes of near misses of one kind of norm, which follows from the mean of squares in it."""
_STILL_IT = ("rounded", "part", "heads")
"""Codes of near misses after which the search for others goes on."""
_MOST = 40  # nodes to search around a value


class Misses(dict[fx.Node, Reason]):
    """Nodes that are near misses → the reasons.

    Args:
        products: The product of each node of the graph.
        terms: The terms that take each value.
    """

    def __init__(self, products: Mapping[fx.Node, Product], terms: Mapping[Any, Sequence[Term]]) -> None:
        super().__init__()
        self._products = products
        self._terms = terms
        self._near: dict[tuple[fx.Node, str], Reason | None] = {}

    def near(self, value: fx.Node, word: str) -> Reason | None:
        """The near miss of the word among functions of the value only, not of other values; None if there is none."""
        if word not in _CONCERNS or not self:
            return None
        if (value, word) not in self._near:
            self._near[value, word] = self._search(value, word)
        found = self._near[value, word]
        if word == "rms_norm" and found is not None and found.code == "mean":
            other = self.near(value, "layer_norm")
            if other is not None and other.code in ("variance", *_OF_ONE_NORM):
                return None  # it is a LayerNorm that is near, and that says more
        return found

    @cached_property
    def words(self) -> frozenset[str]:
        """Words that no graph is searched for unless something in it is near them."""
        near = (
            reason.code == "variance" or (reason.code in _OF_ONE_NORM and self._is_of_layer_norm(node))
            for node, reason in self.items()
        )
        return frozenset({"layer_norm"} if any(near) else ())

    def _search(self, value: fx.Node, word: str) -> Reason | None:
        waiting, seen = [value], {value}
        found: list[Reason] = []
        while waiting and len(seen) < _MOST:
            for user in waiting.pop(0).users:
                if user in seen or user.op != "call_function":
                    continue
                seen.add(user)
                reason = self.get(user)
                if reason is not None and self._counts(reason, user, word, seen):
                    found.append(reason)
                if self._reads_on(user, word) or (reason is not None and reason.code in _STILL_IT):
                    waiting.append(user)
        return next((reason for codes in _CONCERNS[word] for reason in found if reason.code in codes), None)

    def _reads_on(self, node: fx.Node, word: str) -> bool:
        """Whether a node is still on the way from a value to a word. A bound, for example, makes it another value."""
        product = self._products.get(node)
        if product is None:  # one of several results may be a near miss
            return not isinstance(node.meta.get("val"), torch.Tensor)
        if word == "add":
            return product.multiple is not None
        bounds = (atom for atom, _ in product.factors if isinstance(atom, Function) and atom.name != "abs")
        return product.row is not None or next(bounds, None) is None

    def _counts(self, reason: Reason, node: fx.Node, word: str, seen: set[fx.Node]) -> bool:
        """Whether a near miss belongs to this word.

        A slice of a value does if the slice is normed, or added. A broadcast does if the other operand is no value of
        this search.
        """
        if word in NORMS and reason.code in _OF_ONE_NORM:
            return self._is_of_layer_norm(node) == (word == "layer_norm")
        if reason.code in ("part", "heads"):
            return any(term.word == word for term in self._terms.get(node, ()))
        return reason.code != "broadcast" or sum(source in seen for source in node.all_input_nodes) == 1

    def _is_of_layer_norm(self, node: fx.Node) -> bool:
        """Whether a node is computed from a tensor minus its mean, or from its variance."""
        return any(is_of_layer_norm(p) for n in node.all_input_nodes if (p := self._products.get(n)) is not None)
