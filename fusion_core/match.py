"""Patterns against a lifted graph: where one stands, what it binds, and why it does not stand elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_core.lifting.term import Term
from fusion_core.lifting.view import LiftedGraph
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.reason import Reason
from fusion_core.vocabulary.operation import Step, Symbol


@dataclass(frozen=True, eq=False)
class Match:
    """One pattern at one all_reduce.

    Attributes:
        pattern: The pattern.
        anchor: The all_reduce.
        terms: The terms of the graph, one for each step of the pattern.
        bound: The pattern's parameters and ``group`` → a node, a scalar, or None.
        outputs: The pattern's live outputs → the nodes that hold them, in the pattern's order.
        erased: Nodes that the place is made of and nothing else uses, in graph order.
    """

    pattern: Pattern
    anchor: fx.Node
    terms: tuple[Term, ...]
    bound: dict[str, Any]
    outputs: dict[str, fx.Node]
    erased: tuple[fx.Node, ...]


def match(pattern: Pattern, view: LiftedGraph, anchor: fx.Node, term: Term) -> Match | Reason:
    """The pattern at an all_reduce, or the reason of its nearest miss."""
    if term.refusal is not None:
        return term.refusal
    for step in pattern.steps[1:]:
        if step.operation.name not in view.words:  # most patterns, in most graphs: not worth a walk
            word = step.operation.name
            return Reason("structure", f"nothing in this graph reads as {word}", f"{word} of what comes before")
    first = pattern.steps[0]
    environment = _unify(first, term, {})
    if environment is None:
        return Reason("structure", f"{anchor.name} is another all_reduce than the pattern's")
    nearest: tuple[int, Reason] | None = None
    for outcome in _follow(pattern, view, [term], environment):
        if isinstance(outcome, tuple):
            depth, reason = outcome
        else:
            terms, environment = outcome.terms, outcome.environment
            result = _settle(pattern, view, anchor, terms, environment)
            if isinstance(result, Match):
                return result
            depth, reason = len(terms), result
        if nearest is None or depth > nearest[0]:
            nearest = depth, reason
    assert nearest is not None
    return nearest[1]


@dataclass(frozen=True)
class _Bound:
    terms: list[Term]
    environment: dict[Symbol, Any]


def _follow(
    pattern: Pattern, view: LiftedGraph, terms: list[Term], environment: dict[Symbol, Any]
) -> Iterator[_Bound | tuple[int, Reason]]:
    """Every way to go on from the terms so far, and the miss where there is none."""
    depth = len(terms)
    if depth == len(pattern.steps):
        yield _Bound(terms, environment)
        return
    step = pattern.steps[depth]
    known = next(
        environment[o] for o in step.operands.values() if isinstance(o, Symbol) and o in environment and o.step
    )
    candidates = list(view.terms(known, step.operation.name)) if isinstance(known, fx.Node) else []
    if not candidates:
        yield depth, _missing(step, known)
    for term in candidates:
        if term.refusal is not None:
            yield depth, term.refusal
            continue
        for operands in _orders(step, term):
            extended = _unify(step, Term(term.word, operands, term.results), environment)
            if extended is None:
                yield (
                    depth,
                    Reason("structure", f"{step.operation.name} of {known} takes other operands than the pattern's"),
                )
            else:
                yield from _follow(pattern, view, [*terms, term], extended)


def _missing(step: Step, known: Any) -> Reason:
    users = ", ".join(user.name for user in list(getattr(known, "users", ()))[:3]) or "nothing"
    return Reason("structure", f"{known} is followed by {users}", f"{step.operation.name} of it")


def _orders(step: Step, term: Term) -> Iterator[dict[str, Any]]:
    """The operands as they stand and, for a commutative word, exchanged."""
    yield term.operands
    if step.operation.commutative:
        a, b = step.operation.commutative
        yield {**term.operands, a: term.operands[b], b: term.operands[a]}


def _unify(step: Step, term: Term, environment: dict[Symbol, Any]) -> dict[Symbol, Any] | None:
    """The environment with a step's symbols bound as a term has them; None where they contradict."""
    extended = dict(environment)
    for name, wanted in step.operands.items():
        if name not in term.operands:
            return None
        found = term.operands[name]
        if not isinstance(wanted, Symbol):
            if found is not wanted and found != wanted:
                return None
        elif wanted in extended:
            if extended[wanted] is not found and (isinstance(found, fx.Node) or extended[wanted] != found):
                return None
        else:
            extended[wanted] = found
    for result in step.results:
        extended[result] = term.results.get(result.name)
    return extended


def _settle(
    pattern: Pattern, view: LiftedGraph, anchor: fx.Node, terms: list[Term], environment: dict[Symbol, Any]
) -> Match | Reason:
    """Which nodes the place is made of, which of its values are live, and whether it can be replaced as a whole."""
    values = dict(zip(pattern.outputs, (environment[symbol] for symbol in pattern.values), strict=True))
    bound = {symbol.name: value for symbol, value in environment.items() if symbol.step is None}
    if reason := _depends_on_itself(view, anchor, bound):
        return reason
    body = _body(view, anchor, terms)
    named = {node: name for name, node in values.items() if node is not None}
    kept: set[fx.Node] = set()
    for node in sorted(body, key=view.position.__getitem__, reverse=True):
        outside = [user for user in node.users if user not in body or user in kept]
        if not outside or node in named:
            continue
        if view.tensor(node) not in named:
            return Reason(
                "live_value",
                f"{node.name} inside the chain is used by {outside[0].name}",
                f"uses of {', '.join(values)} only",
            )
        kept.add(node)  # a cast or view of a named value: it stays, and makes that value live
    body -= kept
    if reason := _mutated(view, bound, body):
        return reason
    outputs = {
        name: node for name, node in values.items() if node is not None and any(user not in body for user in node.users)
    }
    return Match(pattern, anchor, tuple(terms), bound, outputs, tuple(sorted(body, key=view.position.__getitem__)))


def _body(view: LiftedGraph, anchor: fx.Node, terms: list[Term]) -> set[fx.Node]:
    """Every node between the all_reduce and the last value; what leads to a weight is not among them."""
    inside: dict[fx.Node, bool] = {anchor: True}
    start = view.position[anchor]

    def reaches(root: fx.Node) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            pending = [n for n in node.all_input_nodes if n not in inside and view.position[n] > start]
            if pending and node not in inside:
                stack.extend(pending)
                continue
            stack.pop()
            inside[node] = any(inside.get(n, False) for n in node.all_input_nodes)

    for term in terms:
        for node in term.results.values():
            if node not in inside:
                reaches(node)
    return {node for node, is_inside in inside.items() if is_inside}


def _depends_on_itself(view: LiftedGraph, anchor: fx.Node, bound: dict[str, Any]) -> Reason | None:
    """Whether an input of the place is computed from the all_reduce's result, so that it cannot come first."""
    for name, node in bound.items():
        if isinstance(node, fx.Node) and view.position[node] > view.position[anchor] and _descends(view, node, anchor):
            return Reason(
                "structure",
                f"{name} ({node.name}) is computed from the all_reduce's result",
                "an independent one",
                name,
            )
    return None


def _descends(view: LiftedGraph, node: fx.Node, anchor: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is anchor:
            return True
        for n in current.all_input_nodes:
            if n not in seen and view.position[n] >= view.position[anchor]:
                seen.add(n)
                stack.append(n)
    return False


def _mutated(view: LiftedGraph, bound: dict[str, Any], body: set[fx.Node]) -> Reason | None:
    """Whether something writes into a value of the place, or into an input before the place's last node."""
    last = max(view.position[node] for node in body)
    for node in body:
        if writer := _writer(node, lambda user: user not in body):
            return Reason("mutation", f"{writer.name} writes into {node.name}", "a value that nothing writes into")
    for name, node in bound.items():
        if isinstance(node, fx.Node) and (
            writer := _writer(node, lambda user: user not in body and view.position[user] <= last)
        ):
            return Reason(
                "mutation",
                f"{writer.name} writes into {name} ({node.name}) inside the chain",
                "an input that stays as it is",
                name,
            )
    return None


def _writer(node: fx.Node, counts: Any) -> fx.Node | None:
    """A user that writes into a node's memory, looked for through views of it."""
    for user in node.users:
        arguments = getattr(getattr(user.target, "_schema", None), "arguments", ())
        for argument, value in zip(arguments, user.args, strict=False):
            if value is not node or argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                if counts(user):
                    return user
            elif writer := _writer(user, counts):
                return writer
    return None


def is_tensor(value: object) -> bool:
    """Whether a bound value is a tensor of the graph."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


__all__ = ["GROUP", "Match", "is_tensor", "match"]
