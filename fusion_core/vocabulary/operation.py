"""A word of the neutral vocabulary, and the recording of expressions over such words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusion_core.errors import PatternError


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """An unknown value in a recorded expression: a parameter of it, or one result of a step."""

    name: str
    step: Step | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One application of an operation in a recorded expression.

    ``operands`` maps parameter names of the operation to a `Symbol` or a constant, defaults filled in.
    """

    operation: Operation
    operands: dict[str, Any]
    results: tuple[Symbol, ...] = ()


class Recorder:
    """Collects the steps of an expression while a plain Python function runs on symbols."""

    active: Recorder | None = None

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __enter__(self) -> Recorder:
        if Recorder.active is not None:
            raise PatternError("an expression is already being recorded, needs one at a time")
        Recorder.active = self
        return self

    def __exit__(self, *exc: object) -> None:
        Recorder.active = None


class Operation:
    """A word of the neutral vocabulary: a name and the plain torch function that defines it.

    Called with tensors it computes; called with symbols, while a pattern is recorded, it is recorded as a step.

    Attributes:
        name: Its name in lifting and in reports.
        function: The definition.
        results: Names of its results, in order.
        commutative: Two parameters that may be exchanged, or nothing.
        alone: For a collective, a function of its tensors that gives the results in a group of one rank. None for a
            word that does not communicate.
        by_rank: Whether a collective's results, or what follows it, are of each rank's own part of a vector.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        results: tuple[str, ...] = ("result",),
        commutative: tuple[str, ...] = (),
        alone: Callable[..., Any] | None = None,
        by_rank: bool = False,
    ) -> None:
        self.name = name or function.__name__
        self.function = function
        self.results = results
        self.commutative = commutative
        self.alone = alone
        self.by_rank = by_rank
        self.signature = inspect.signature(function)
        if commutative and (len(commutative) != 2 or not set(commutative) <= set(self.signature.parameters)):
            raise PatternError(f"operation {self.name!r} is commutative in {commutative}, needs two of its parameters")
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The definition's results, or symbols for them while an expression is being recorded."""
        if Recorder.active is None:
            return self.function(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        step = Step(self, dict(bound.arguments))
        results = tuple(Symbol(name, step) for name in self.results)
        object.__setattr__(step, "results", results)
        Recorder.active.steps.append(step)
        return results[0] if len(results) == 1 else results

    def __repr__(self) -> str:
        return f"Operation({self.name!r})"


def operation(
    *,
    results: tuple[str, ...] = ("result",),
    commutative: tuple[str, ...] = (),
    alone: Callable[..., Any] | None = None,
    by_rank: bool = False,
) -> Callable[[Callable[..., Any]], Operation]:
    """Decorator that makes a plain torch function a word of the vocabulary, named after the function."""
    return lambda function: Operation(function, results=results, commutative=commutative, alone=alone, by_rank=by_rank)
