"""Patterns against a lifted graph: where one stands, what it binds, and why it does not stand elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fusion_core.lift.graph import LiftedGraph
from fusion_core.lift.graph_end import ending
from fusion_core.lift.rules import is_cheap
from fusion_core.lift.term import Term, Unheld, held_by, nodes_of
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.reason import Reason
from fusion_core.vocabulary.operation import Step, Symbol

FIRST_WORDS = ("add", "rms_norm")
"""What follows an all_reduce in core's patterns: where one is missing, what stands there instead is the reason."""


@dataclass(frozen=True, eq=False)
class Match:
    """One pattern at one all_reduce.

    Attributes:
        pattern: The pattern.
        anchor: The all_reduce.
        terms: The terms of the graph, one for each step of the pattern.
        bound: The pattern's parameters and ``group`` → a node, a `Sum`, a scalar, or None.
        outputs: The pattern's live outputs → the nodes that hold them, in the pattern's order.
        erased: Nodes that the place is made of and nothing else uses, in graph order.
        kept: Nodes between that something outside uses, and that can be computed from live outputs as they stand.
        notes: Facts about the spelling, for the site's attributes.
        twins: Further nodes that hold a live output → which.
    """

    pattern: Pattern
    anchor: fx.Node
    terms: tuple[Term, ...]
    bound: dict[str, Any]
    outputs: dict[str, fx.Node]
    erased: tuple[fx.Node, ...]
    kept: frozenset[fx.Node] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict)
    twins: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def scalars(self) -> dict[str, Any]:
        """All that is bound but tensors: scalars, the group, and None for a tensor that is absent."""
        bound = {name: self.bound.get(name, parameter.default) for name, parameter in self.pattern.parameters.items()}
        return {name: value for name, value in bound.items() if held_by(value) is None} | {GROUP: self.bound[GROUP]}

    @property
    def holders(self) -> dict[fx.Node, str]:
        """Every node that holds a live output → which."""
        return {node: name for name, node in self.outputs.items()} | self.twins


@dataclass(frozen=True, slots=True)
class Miss:
    """How far one pattern stands at one all_reduce.

    Attributes:
        depth: How many of its steps stand there; 0 where they were not looked for.
        reason: Why no more of them do.
    """

    depth: int
    reason: Reason


def match(pattern: Pattern, view: LiftedGraph, anchor: fx.Node, term: Term) -> Match | Miss:
    """The pattern at an all_reduce, or its nearest miss."""
    if term.refusal is not None:
        return Miss(0, term.refusal)
    for step in pattern.steps[1:]:
        word = step.operation.name
        # most patterns, in most graphs: not worth a walk. Of a chain's first words the place itself says more
        if word not in view.words and word not in FIRST_WORDS:
            return Miss(
                0, Reason("structure", f"nothing in this graph reads as {word}", f"{word} of what comes before")
            )
    first = pattern.steps[0]
    environment = _unify(first, term.operands, term, {})
    if environment is None:
        return Miss(0, Reason("structure", f"{anchor.name} is another all_reduce than the pattern's"))
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
                if not result.kept:
                    return result
                if found is None or len(result.kept) < len(found.kept):
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
    """Every way to go on from the terms so far, and the miss where there is none."""
    depth = len(terms)
    if depth == len(pattern.steps):
        yield _Bound(terms, environment)
        return
    step = pattern.steps[depth]
    symbol = next(o for o in step.operands.values() if isinstance(o, Symbol) and o in environment and o.step)
    known, word = environment[symbol], step.operation.name
    candidates = list(view.terms(known, word)) if isinstance(known, fx.Node | Unheld) else []
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
    """Why a word does not follow a value, in words that are the same in each of a model's layers."""
    name = symbol.step.operation.name if symbol.step is not None else symbol.name
    if word == "add" and next(view.terms(known, "rms_norm"), None) is not None:
        return Reason("structure", f"{name} is normed as it is; what is added, is added after the norm", "add of it")
    behind, ends = view.followers(known) if isinstance(known, fx.Node) else ((), False)
    if ends and not behind:
        return ending(name, word)
    found = ", ".join(behind[:3]) or "nothing"
    return Reason("structure", f"{name} is followed by {found}", f"{word} of it")


def _orders(step: Step, term: Term) -> Iterator[dict[str, Any]]:
    """The operands as they stand and, for a commutative word, exchanged."""
    yield term.operands
    if step.operation.commutative:
        a, b = step.operation.commutative
        yield {**term.operands, a: term.operands[b], b: term.operands[a]}


def _unify(
    step: Step, operands: dict[str, Any], term: Term, environment: dict[Symbol, Any]
) -> dict[Symbol, Any] | None:
    """The environment with a step's symbols bound as a term has them; None where they contradict."""
    extended = dict(environment)
    for name, wanted in step.operands.items():
        if name not in operands:
            return None
        found = operands[name]
        if not isinstance(wanted, Symbol):
            if found is not wanted and found != wanted:
                return None
        elif wanted in extended:
            if extended[wanted] is not found and (isinstance(found, fx.Node | Unheld) or extended[wanted] != found):
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
    if not any(isinstance(result, fx.Node) for result in terms[-1].results.values()):
        held = ", ".join(map(str, terms[-1].results.values()))
        return Reason("live_value", f"no node holds {held}", "a result that something uses")
    body = _body(view, anchor, terms)
    twins = {node: name for term in terms for node, name in _twins(pattern, term, values).items()}
    named = {node for node in values.values() if isinstance(node, fx.Node)} | set(twins)
    kept: set[fx.Node] = set()
    for node in sorted(body, key=view.position.__getitem__):
        outside = next((user for user in node.users if user not in body), None)
        if outside is None or node in named or _keep(node, named, body, kept):
            continue
        live = ", ".join(values)
        return Reason("live_value", f"{node.name} inside the chain is used by {outside.name}", f"uses of {live} only")
    erased = body - kept
    if reason := _mutated(view, bound, erased):
        return reason
    outputs = {
        name: node
        for name, node in values.items()
        if isinstance(node, fx.Node)
        and any(user not in erased for n in (node, *(t for t in twins if twins[t] == name)) for user in n.users)
    }
    order = sorted(erased, key=view.position.__getitem__)
    arithmetic = frozenset(node for node in kept if view.tensor(node) not in named)
    notes = {key: note for term in terms for key, note in term.notes.items()}
    again = {node: output for node, output in twins.items() if any(user not in erased for user in node.users)}
    return Match(pattern, anchor, tuple(terms), bound, outputs, tuple(order), arithmetic, notes, again)


def _twins(pattern: Pattern, term: Term, values: dict[str, Any]) -> dict[fx.Node, str]:
    """Nodes that compute an output once more → the output."""
    names = {value: name for name, value in values.items()}
    return {node: names[held] for node, name in term.twins.items() if (held := term.results[name]) in names}


def _keep(node: fx.Node, named: set[fx.Node], body: set[fx.Node], kept: set[fx.Node]) -> bool:
    """Whether a node can stay where it is, computed from live outputs; it and what it needs are then kept.

    Casts, views and steps of arithmetic only. A reduction that stays would be half of what is fused, done twice.
    """
    needed: list[fx.Node] = []
    stack = [node]
    while stack:
        current = stack.pop()
        if current in named or current in kept or current not in body:
            continue
        if not is_cheap(current):
            return False
        needed.append(current)
        stack += current.all_input_nodes
    kept.update(needed)
    return True


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
        for node in (*term.results.values(), *term.twins):
            if isinstance(node, fx.Node) and node not in inside:
                reaches(node)
    return {node for node, is_inside in inside.items() if is_inside}


def _depends_on_itself(pattern: Pattern, view: LiftedGraph, anchor: fx.Node, bound: dict[str, Any]) -> Miss | None:
    """Whether an input of the place is computed from the all_reduce's result, so that it cannot come first.

    The step that takes it is none of the chain, so that as many steps stand as come before it.
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
    """Whether something writes into a value of the place, or into an input before the place's last node."""
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
