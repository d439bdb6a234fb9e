"""The meaning of another framework's operators in the neutral vocabulary, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fusion_core.errors import PatternError
from fusion_core.lift.operands import Check, Derived, Earlier, Only
from fusion_core.lift.operator_call import OperatorCall, Result
from fusion_core.lift.term import Term, Virtual
from fusion_core.reason import Reason


@dataclass(frozen=True)
class Reading:
    """The meaning of an operator as one word of the vocabulary. A tuple of readings means several words in sequence.

    A reading accounts for every argument of the operator: as an operand, in a condition, as a result, or ignored. If
    another argument differs from its default, the site is refused for that reason.

    Attributes:
        word: The word's name.
        operands: The word's parameter → the name of the operator's argument, an `Earlier` word's result, or a value
            `Derived` from arguments.
        constants: The word's parameter → a constant, if the operator has no argument for it.
        results: The word's result names: a tuple with one per result of the operator, in the operator's order; or a
            mapping from each to its location: the index of a returned value, the name of an argument that the operator
            writes into, or None if it stays inside the operator.
        needs: Conditions under which the operator means the word: `Only`, `Check`.
        when: An argument; without it the operator does not compute this word.
        ignored: Arguments that do not change the operator's meaning.
        notes: Facts about the spelling, which become attributes of the site.

    Example:
        For ``acme::rms_norm(Tensor hidden, Tensor gamma, float epsilon) -> Tensor``; the reading gives every parameter
        of the word:

        >>> reading = Reading(
        ...     "rms_norm",
        ...     operands={"x": "hidden", "weight": "gamma", "eps": "epsilon"},
        ...     constants={"weight_bias": 0.0, "dtype": None},
        ...     results=("normed",),
        ... )
        >>> from fusion_core.vocabulary import rms_norm
        >>> set(rms_norm.signature.parameters) == {*reading.operands, *reading.constants}
        True
        >>> dialect = Dialect("acme", {"acme::rms_norm": reading})
    """

    word: str
    operands: Mapping[str, str | Earlier | Derived]
    constants: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[str, ...] | Mapping[str, int | str | None] = ("result",)
    needs: tuple[Only | Check, ...] = ()
    when: str | None = None
    ignored: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> set[str]:
        """The word's parameters that it gives."""
        return {*self.operands, *self.constants}

    @property
    def holders(self) -> dict[str, int | str | None]:
        """The word's result names → the index of a returned value, a written argument, or None."""
        if isinstance(self.results, tuple):
            return {name: index for index, name in enumerate(self.results)}
        return dict(self.results)

    @property
    def sources(self) -> Iterator[int | str]:
        """Every argument (by name) and returned value (by index) that it accounts for."""
        for operand in self.operands.values():
            yield from (operand,) if isinstance(operand, str) else operand.sources
        for need in self.needs:
            yield from need.sources
        yield from (holder for holder in self.holders.values() if holder is not None)
        yield from self.ignored
        if self.when is not None:
            yield self.when

    def read(self, call: OperatorCall, earlier: Mapping[str, fx.Node | Virtual]) -> Term:
        """The term of a call. ``earlier`` are the results of the operator's earlier words."""
        refusals = [reason for need in self.needs if (reason := need.unmet(call)) is not None]
        operands = dict(self.constants)
        for parameter, operand in self.operands.items():
            found = call.arguments[operand] if isinstance(operand, str) else operand.of(call, earlier)
            if isinstance(found, Reason):
                refusals.append(found)
                found = None
            operands[parameter] = found
        results: dict[str, fx.Node | Virtual] = {}
        for name, holder in self.holders.items():
            held: Result = Virtual(call.node, f"{name} of {call.name}") if holder is None else call.results[holder]
            if isinstance(held, Reason):
                refusals.append(held)
                held = Virtual(call.node, f"{name} of {call.name}")
            results[name] = held
        return Term(self.word, operands, results, refusals[0] if refusals else None, dict(self.notes))


@dataclass(frozen=True)
class Refusal:
    """An operator that is close to some words but is none of them. Where they are looked for, the report has a reason.

    Attributes:
        words: The words' names.
        operand: The operator's argument that would be the words' first operand.
        reason: How the operator differs.

    Example:
        >>> reason = Reason("per_tensor", "acme::quantize takes one scale for the whole tensor", "one for each token")
        >>> refusal = Refusal(("quantize_token_fp8",), "hidden", reason)
        >>> dialect = Dialect("acme", {"acme::quantize": refusal})
    """

    words: tuple[str, ...]
    operand: str
    reason: Reason

    @property
    def sources(self) -> tuple[str, ...]:
        """The arguments that it names."""
        return (self.operand,)


@dataclass(frozen=True)
class Dialect:
    """Readings of a family of operators.

    Attributes:
        name: Its name in messages.
        readings: The operator's qualified name (``"acme::rms_norm"``, or ``"acme::rms_norm.out"`` for one overload) →
            a `Reading`, several for words in sequence, or a `Refusal`.
        state: External state that the readings depend on, e.g. a table of group names. It becomes part of the
            compile-cache key.
    """

    name: str
    readings: Mapping[str, Reading | tuple[Reading, ...] | Refusal]
    state: Callable[[], object] | None = field(default=None, repr=False)

    def words_of(self, operator: str) -> tuple[Reading, ...]:
        """The readings of one operator, in order; none for a `Refusal`."""
        reading = self.readings[operator]
        if isinstance(reading, Reading):
            return (reading,)
        return () if isinstance(reading, Refusal) else reading


def read(reading: Reading | tuple[Reading, ...] | Refusal, call: OperatorCall) -> list[Term]:
    """The terms of a call.

    Raises:
        PatternError: The reading names an argument or result that the operator lacks, or leaves out an argument
            without a default.
    """
    readings: tuple[Reading | Refusal, ...] = reading if isinstance(reading, tuple) else (reading,)
    named = {source for each in readings for source in each.sources}
    _check(call, named)
    if isinstance(reading, Refusal):
        operand = call.arguments[reading.operand]
        return [Term(word, {"x": operand}, {}, reading.reason) for word in reading.words]
    overlooked = _overlooked(call, named)
    terms: list[Term] = []
    earlier: dict[str, fx.Node | Virtual] = {}
    for each in readings:
        assert isinstance(each, Reading)
        if each.when is not None and call.arguments[each.when] is None:
            continue
        term = each.read(call, earlier)
        if overlooked is not None and term.refusal is None:
            term = Term(term.word, term.operands, term.results, overlooked, term.notes)
        earlier |= term.results
        terms.append(term)
    return terms


def _check(call: OperatorCall, named: Iterable[int | str]) -> None:
    """Raise if a reading names an argument or result that the operator does not have."""
    arguments = {argument.name for argument in call.schema.arguments}
    for source in named:
        if source not in (arguments if isinstance(source, str) else range(len(call.schema.returns))):
            kind = "argument" if isinstance(source, str) else "result"
            raise PatternError(f"reading of {call.name} uses its {kind} {source!r}, needs one of {call.schema}")


def _overlooked(call: OperatorCall, named: set[int | str]) -> Reason | None:
    """The reason if an argument that the reading does not account for differs from its default, else None."""
    for argument in call.schema.arguments:
        if argument.name in named:
            continue
        if not argument.has_default_value():
            raise PatternError(f"reading of {call.name} leaves out its argument {argument.name!r}, of {call.schema}")
        if (reason := Only(argument.name, argument.default_value).unmet(call)) is not None:
            return reason
    return None
