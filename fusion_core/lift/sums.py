"""Sums with an all_reduce in them: as a model spells them, and as the all_reduce and all that is added to it.

A model adds a residual to what a layer gives, which may be a sum itself: of a bias, of a LoRA adapter, of a scaled
tensor. A kernel takes one tensor besides the all_reduce, so the others are added up first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Product, dtype_of, one_element, promoted, same_shape, same_size, shape_of
from fusion_core.lift.norm import lies_along
from fusion_core.lift.term import Addend, Sum, Term
from fusion_core.reason import Reason

ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


class Sums:
    """The sums of one graph.

    Args:
        reduced: The results of all_reduces.
        product: The product that an argument is.
        tensor: The node that a node has its value from.
        position: Each node's index in the graph.
        misses: Reasons why a node is no sum of a pattern, which are added to.
    """

    def __init__(
        self,
        reduced: set[Any],
        product: Callable[[Any], Product],
        tensor: Callable[[fx.Node], fx.Node],
        position: Callable[[], dict[fx.Node, int]],
        misses: MutableMapping[fx.Node, Reason],
    ) -> None:
        self._reduced = reduced
        self._product = product
        self._tensor = tensor
        self._position = position
        self._misses = misses
        self._pairs: dict[fx.Node, Term] = {}
        self._addends: dict[fx.Node, tuple[Addend, ...]] = {}

    def pair(self, node: fx.Node) -> Term | None:
        """The sum of two tensors that a node is, as it is spelled; None for another node."""
        return self._pairs.get(node)

    def read(self, node: fx.Node) -> Iterator[Term]:
        """The readings of an addition or a subtraction as ``add`` or ``add_bias``."""
        left, right = node.args[:2]
        alpha = node.kwargs.get("alpha", 1)
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node) and isinstance(alpha, int | float)):
            return
        sign = -1.0 if node.target is torch.ops.aten.sub.Tensor else 1.0
        first, second = self._addend(node, left, 1.0), self._addend(node, right, sign * alpha)
        for operand, addend in ((left, first), (right, second)):
            if (addend is None or addend.is_row) and not one_element(operand) and node not in self._misses:
                shape, whole = (", ".join(map(str, shape_of(n))) for n in (operand, node))
                found = f"{operand.name}, of shape [{shape}], is broadcast by {node.name}"
                self._misses[node] = Reason("broadcast", found, f"the shape [{whole}]", "residual")
        if first is None or second is None:
            return
        if not first.is_row and not second.is_row and (term := self._spelled(node, first, second)) is not None:
            self._pairs[node] = term
            yield term
        if (term := self._taken_apart(node, first, second)) is not None:
            yield term
        if (term := self._biased(node, first, second)) is not None:
            yield term

    def _addend(self, node: fx.Node, operand: fx.Node, factor: float) -> Addend | None:
        """An operand of a sum: an all_reduce times a number, or another value; None if it is broadcast over rows."""
        if not same_shape(shape_of(operand), shape_of(node)):
            return Addend(operand, factor, is_row=True) if _is_row_of(operand, node) else None
        product = self._product(operand)
        base = product.multiple
        if base is not None and base in self._reduced and same_rows(operand, base):
            return Addend(base, factor * product.coefficient)
        base = self._tensor(operand)
        return Addend(base if same_rows(operand, base) else operand, factor)

    def _spelled(self, node: fx.Node, left: Addend, right: Addend) -> Term | None:
        """A sum of two tensors as it is spelled; None if one that is no all_reduce is scaled."""
        scaled = [addend for addend in (left, right) if addend.factor != 1.0]
        if any(addend.node not in self._reduced for addend in scaled):
            return None
        refusal = None
        if scaled:
            found = f"the all_reduce's side of {node.name} is scaled by {scaled[0].factor:g}"
            refusal = Reason("scaled", found, "the sum as it is")
        operands = {"x": left.node, "residual": right.node, "dtype": sum_dtype(node, left.node, right.node)}
        return Term("add", operands, {"sum": node}, refusal)

    def _taken_apart(self, node: fx.Node, *own: Addend) -> Term | None:
        """A sum as its last all_reduce and the sum of all others; None where it is spelled so, or cannot be.

        Inner sums with that all_reduce in them are taken apart if nothing else uses them. Others stay: they may be a
        part of another site.
        """
        self._addends[node] = own
        parts = [part for addend in own for part in self._parts(addend, node)]
        unscaled = [a for a in parts if a.factor == 1.0 and a.node in self._reduced and not a.is_row]
        position = self._position()
        last = max(unscaled, key=lambda addend: position[addend.node], default=None)
        if last is None or (last in own and not any(a.is_row or a.factor != 1.0 for a in own)):
            return None
        others = [addend for one in own for addend in self._beside(last, one, node)]
        others.sort(key=lambda addend: addend.is_row)
        if others[0].is_row or len({dtype_of(n) for n in (node, last.node, *(a.node for a in others))}) > 1:
            return None
        operands = {"x": last.node, "residual": Sum(tuple(others), node), "dtype": None}
        return Term("add", operands, {"sum": node}, notes={"reassociated": True} if len(others) > 1 else {})

    def _biased(self, node: fx.Node, *own: Addend) -> Term | None:
        """An all_reduce and a vector that is added to each row."""
        for reduced, bias in (own, own[::-1]):
            if reduced.is_row or reduced.factor != 1.0 or reduced.node not in self._reduced:
                continue
            if bias.is_row and bias.factor == 1.0 and lies_along(bias.node, node):
                vector = self._tensor(bias.node)
                dtype = sum_dtype(node, reduced.node, vector)
                return Term("add_bias", {"x": reduced.node, "bias": vector, "dtype": dtype}, {"sum": node})
        return None

    def _parts(self, addend: Addend, node: fx.Node) -> tuple[Addend, ...]:
        """An addend of a sum, or those of the inner sum that it is."""
        inner = self._addends.get(addend.node)
        if inner is None or addend.factor != 1.0 or dtype_of(addend.node) != dtype_of(node):
            return (addend,)
        if not self._leads_only_to(addend.node, node):
            return (addend,)
        return tuple(part for each in inner for part in self._parts(each, addend.node))

    def _beside(self, last: Addend, addend: Addend, node: fx.Node) -> Iterator[Addend]:
        """What an addend of a sum has besides one of its parts; all of it if that is not in it."""
        if addend is last:
            return
        if all(part is not last for part in self._parts(addend, node)):
            yield addend
            return
        for each in self._addends[addend.node]:
            yield from self._beside(last, each, addend.node)

    def _leads_only_to(self, node: fx.Node, target: fx.Node) -> bool:
        users = list(node.users)
        while users:
            user = users.pop()
            if user is target:
                continue
            if user.op != "call_function" or self._tensor(user) is not node:
                return False
            users += user.users
        return True


def same_rows(node: fx.Node, base: fx.Node) -> bool:
    """Whether a node has the same last dimension and number of elements as another."""
    a, b = shape_of(node), shape_of(base)
    return bool(a and b) and same_size(a[-1], b[-1]) and (same_shape(a, b) or same_size(_numel(node), _numel(base)))


def sum_dtype(node: fx.Node, x: Any, residual: Any) -> torch.dtype | None:
    """The dtype of a sum, or None if it is that of torch's promotion."""
    dtypes = [dtype_of(operand) for operand in (x, residual) if isinstance(operand, fx.Node)]
    usual = promoted(dtypes[0], dtypes[-1])
    return None if (dtype := dtype_of(node)) == usual else dtype


def _is_row_of(node: fx.Node, whole: fx.Node) -> bool:
    """Whether a tensor has the last dimension of another alone, or one element."""
    shape = shape_of(node)
    along = bool(shape) and same_size(shape[-1], shape_of(whole)[-1]) and all(same_size(n, 1) for n in shape[:-1])
    return along or one_element(node)


def _numel(node: fx.Node) -> Any:
    return node.meta["val"].numel()
