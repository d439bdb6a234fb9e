"""Matching of a pattern at an all_reduce of a lifted graph: what it binds, or why it does not match."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fusion_core.lift.graph import LiftedGraph
from fusion_core.lift.graph_end import ending
from fusion_core.lift.misses import NORMS
from fusion_core.lift.rules import is_cheap
from fusion_core.lift.term import Term, Virtual, held_by, nodes_of
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.reason import Reason
from fusion_core.vocabulary.operation import Step, Symbol

FIRST_WORDS = ("add", "rms_norm")
"""The words after all_reduce in core's patterns. If one is missing, the reason names what follows instead."""


@dataclass(frozen=True, eq=False)
class Match:
    """One pattern at one all_reduce.

    Attributes:
        pattern: The pattern.
        anchor: The all_reduce.
        terms: The terms of the graph, one for each step of the pattern.
        bound: The pattern's parameters and ``group`` → a node, a `Sum`, a scalar, or None.
        outputs: The pattern's live outputs → their nodes, in the pattern's order.
        removed: Nodes of the site that nothing else uses, in graph order.
        retained: Nodes inside the chain that are used outside, and that stay, computed from live outputs.
        notes: Facts about the spelling, for the site's attributes.
        duplicates: Further nodes with the value of a live output → the output.
    """

    pattern: Pattern
    anchor: fx.Node
    terms: tuple[Term, ...]
    bound: dict[str, Any]
    outputs: dict[str, fx.Node]
    removed: tuple[fx.Node, ...]
    retained: frozenset[fx.Node] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)
    duplicates: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def scalars(self) -> dict[str, Any]:
        """Everything bound except tensors: scalars, the group, and None for an absent tensor."""
        bound = {name: self.bound.get(name, parameter.default) for name, parameter in self.pattern.parameters.items()}
        return {name: value for name, value in bound.items() if held_by(value) is None} | {GROUP: self.bound[GROUP]}

    @property
    def holders(self) -> dict[fx.Node, str]:
        """Every node with the value of a live output → the output."""
        return {node: name for name, node in self.outputs.items()} | self.duplicates


@dataclass(frozen=True, slots=True)
class Miss:
    """How far one pattern matches at one all_reduce.

    Attributes:
        depth: The number of its steps that match; 0 if they were not searched.
        reason: Why the next step does not match.
    """

    depth: int
    reason: Reason


def match(pattern: Pattern, view: LiftedGraph, anchor: fx.Node, term: Term) -> Match | Miss:
    """The pattern at an all_reduce, or its nearest miss."""
    if term.refusal is not None:
        return Miss(0, term.refusal)
    for step in pattern.steps[1:]:
        word = step.operation.name
        # true for most patterns in most graphs, and saves a walk. For a chain's first words the walk finds more
        if word not in view.words and word not in FIRST_WORDS:
            return Miss(
                0, Reason("structure", f"nothing in this graph reads as {word}", f"{word} of what comes before")
            )
    first = pattern.steps[0]
    environment = _unify(first, term.operands, term, {})
    if environment is None:
        return Miss(0, Reason("structure", f"{anchor.name} is another collective than the pattern's"))
    nearest: Miss | None = None
    found: Match | None = None
    for outcome in _follow(pattern, view, [term], environment):
        if isinstance(outcome, Miss):
            miss = outcome
        else:
            terms, environment = outcome.terms, outcome.environment
            bound = {symbol.name: value for symbol, value in environment.items() if symbol.step is None}
            result: Match | Miss | Reason | None = _depends_on_itself(pattern, view, anchor, bound)
            result = result or _settle(pattern, view, anchor, terms, environment)
            if isinstance(result, Match):
                if not result.retained:
                    return result
                if found is None or len(result.retained) < len(found.retained):
                    found = result
                continue
            miss = result if isinstance(result, Miss) else Miss(len(terms), result)
        if nearest is None or miss.depth > nearest.depth:
            nearest = miss
    if found is not None:
        return found
    assert nearest is not None
    return nearest


@dataclass(frozen=True)
class _Bound:
    terms: list[Term]
    environment: dict[Symbol, Any]


def _follow(
    pattern: Pattern, view: LiftedGraph, terms: list[Term], environment: dict[Symbol, Any]
) -> Iterator[_Bound | Miss]:
    """Every way to continue from the terms so far, or the miss if there is none."""
    depth = len(terms)
    if depth == len(pattern.steps):
        yield _Bound(terms, environment)
        return
    step = pattern.steps[depth]
    symbol = next(o for o in step.operands.values() if isinstance(o, Symbol) and o in environment and o.step)
    known, word = environment[symbol], step.operation.name
    candidates = list(view.terms(known, word)) if isinstance(known, fx.Node | Virtual) else []
    if not candidates:
        yield Miss(depth, view.near_miss(known, word) or _missing(view, word, known, symbol))
    for term in candidates:
        if term.refusal is not None:
            yield Miss(depth, term.refusal)
            continue
        for operands in _orders(step, term):
            extended = _unify(step, operands, term, environment)
            if extended is None:
                yield Miss(depth, Reason("structure", f"{word} of {known} takes other operands than the pattern's"))
            else:
                yield from _follow(pattern, view, [*terms, term], extended)


def _missing(view: LiftedGraph, word: str, known: Any, symbol: Symbol) -> Reason:
    """The reason why a word does not follow a value, with a text that is the same in each layer of a model."""
    name = symbol.step.operation.name if symbol.step is not None else symbol.name
    if word == "add" and any(next(view.terms(known, norm), None) is not None for norm in NORMS):
        return Reason("structure", f"{name} is normed before anything is added to it", "add of it")
    behind, ends = view.followers(known) if isinstance(known, fx.Node) else ((), False)
    if ends and not behind:
        return ending(name, word)
    found = ", ".join(behind[:3]) or "nothing"
    return Reason("structure", f"{name} is followed by {found}", f"{word} of it")


def _orders(step: Step, term: Term) -> Iterator[dict[str, Any]]:
    """The operands in order and, for a commutative word, exchanged."""
    yield term.operands
    if step.operation.commutative:
        a, b = step.operation.commutative
        yield {**term.operands, a: term.operands[b], b: term.operands[a]}


def _unify(
    step: Step, operands: dict[str, Any], term: Term, environment: dict[Symbol, Any]
) -> dict[Symbol, Any] | None:
    """The environment with a step's symbols bound to a term's values; None if they contradict each other."""
    extended = dict(environment)
    for name, wanted in step.operands.items():
        if name not in operands:
            return None
        found = operands[name]
        if not isinstance(wanted, Symbol):
            if found is not wanted and found != wanted:
                return None
        elif wanted in extended:
            if extended[wanted] is not found and (isinstance(found, fx.Node | Virtual) or extended[wanted] != found):
                return None
        else:
            extended[wanted] = found
    for result in step.results:
        extended[result] = term.results.get(result.name)
    return extended


def _settle(
    pattern: Pattern, view: LiftedGraph, anchor: fx.Node, terms: list[Term], environment: dict[Symbol, Any]
) -> Match | Reason:
    """The match, with the site's nodes and live values, or the reason why it cannot be replaced as a whole."""
    values = dict(zip(pattern.outputs, (environment[symbol] for symbol in pattern.values), strict=True))
    bound = {symbol.name: value for symbol, value in environment.items() if symbol.step is None}
    if not any(isinstance(result, fx.Node) for result in terms[-1].results.values()):
        held = ", ".join(map(str, terms[-1].results.values()))
        return Reason("live_value", f"no node holds {held}", "a result that something uses")
    body = _body(view, anchor, terms)
    duplicates = {node: name for term in terms for node, name in _duplicates(pattern, term, values).items()}
    named = {node for node in values.values() if isinstance(node, fx.Node)} | set(duplicates)
    retained: set[fx.Node] = set()
    for node in sorted(body, key=view.position.__getitem__):
        outside = next((user for user in node.users if user not in body), None)
        if outside is None or node in named or _keep(node, named, body, retained):
            continue
        live = ", ".join(values)
        return Reason("live_value", f"{node.name} inside the chain is used by {outside.name}", f"uses of {live} only")
    removed = body - retained
    if reason := _mutated(view, bound, removed):
        return reason
    outputs = {
        name: node
        for name, node in values.items()
        if isinstance(node, fx.Node)
        and any(
            user not in removed for n in (node, *(t for t in duplicates if duplicates[t] == name)) for user in n.users
        )
    }
    order = sorted(removed, key=view.position.__getitem__)
    arithmetic = frozenset(node for node in retained if view.tensor(node) not in named)
    notes = {key: note for term in terms for key, note in term.notes.items()}
    again = {node: output for node, output in duplicates.items() if any(user not in removed for user in node.users)}
    return Match(pattern, anchor, tuple(terms), bound, outputs, tuple(order), arithmetic, notes, again)


def _duplicates(pattern: Pattern, term: Term, values: dict[str, Any]) -> dict[fx.Node, str]:
    """Further nodes that compute an output → the output."""
    names = {value: name for name, value in values.items()}
    return {node: names[held] for node, name in term.duplicates.items() if (held := term.results[name]) in names}


def _keep(node: fx.Node, named: set[fx.Node], body: set[fx.Node], retained: set[fx.Node]) -> bool:
    """Whether a node can stay where it is, computed from live outputs. It and the nodes it needs are then retained.

    Only casts, views and arithmetic can. A retained reduction would repeat half of the fused computation.
    """
    needed: list[fx.Node] = []
    stack = [node]
    while stack:
        current = stack.pop()
        if current in named or current in retained or current not in body:
            continue
        if not is_cheap(current):
            return False
        needed.append(current)
        stack += current.all_input_nodes
    retained.update(needed)
    return True


def _body(view: LiftedGraph, anchor: fx.Node, terms: list[Term]) -> set[fx.Node]:
    """Every node on a path from the all_reduce to a result; nodes that only lead to a weight are not included."""
    inside: dict[fx.Node, bool] = dict.fromkeys((anchor, *terms[0].collectives), True)
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
        for node in (*term.results.values(), *term.duplicates):
            if isinstance(node, fx.Node) and node not in inside:
                reaches(node)
    return {node for node, is_inside in inside.items() if is_inside}


def _depends_on_itself(pattern: Pattern, view: LiftedGraph, anchor: fx.Node, bound: dict[str, Any]) -> Miss | None:
    """The miss if an input of the site is computed from the all_reduce's result, else None.

    The step that takes this input cannot be in the site, so the depth is the number of steps before it.
    """
    for name, node in [(name, node) for name, value in bound.items() for node in nodes_of(value)]:
        if view.position[node] > view.position[anchor] and _descends(view, node, anchor):
            found = f"{name} ({node.name}) is computed from the all_reduce's result"
            depth = next(depth for depth, step in enumerate(pattern.steps) if _takes(step, name))
            return Miss(depth, Reason("structure", found, "an independent one", name))
    return None


def _takes(step: Step, name: str) -> bool:
    return any(isinstance(o, Symbol) and o.step is None and o.name == name for o in step.operands.values())


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
    """The reason if a node writes into a value of the site, or into an input before the site's last node."""
    last = max(view.position[node] for node in body)
    for node in body:
        if found := next((user for user in view.writers(node) if user not in body), None):
            return Reason("mutation", f"{found.name} writes into {node.name}", "a value that nothing writes into")
    for name, node in [(name, node) for name, value in bound.items() for node in nodes_of(value)]:
        inside = (user for user in view.writers(node) if user not in body and view.position[user] <= last)
        if found := next(inside, None):
            return Reason(
                "mutation",
                f"{found.name} writes into {name} ({node.name}) inside the chain",
                "an input that stays as it is",
                name,
            )
    return None
