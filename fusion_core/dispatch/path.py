"""One way to run a site outside of a graph: a strategy, or torch's all_reduce and one kernel for what follows it.

In a graph of fixed sizes, Inductor compiles what surrounds a strategy. An operator that chooses at run time has to
provide that itself: the rest of the pattern behind the all_reduce is compiled by Inductor, once for all token counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusion_core import _cuda
from fusion_core._torch import inductor
from fusion_core.errors import blame
from fusion_core.groups import all_reduce_of
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.plugins.strategy import Strategy
from fusion_core.vocabulary.operation import Step, Symbol

BARE = "all_reduce"

Form = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class BoundPattern:
    """A pattern with everything bound but its tensors.

    Attributes:
        pattern: The pattern.
        live: The outputs that are used, in the pattern's order.
        names: The tensors besides x that are given, in the pattern's order.
        scalars: The pattern's scalars by name; those that are missing have their defaults.
        group: The process group's name.
    """

    pattern: Pattern
    live: tuple[str, ...]
    names: tuple[str, ...]
    scalars: Mapping[str, Any]
    group: str

    @functools.cached_property
    def _bound(self) -> dict[str, Any]:
        absent = dict.fromkeys(name for name in self.pattern.tensors if name not in ("x", *self.names))
        defaults = {name: self.pattern.parameters[name].default for name in self.pattern.scalars}
        return {**absent, **defaults, **self.scalars, GROUP: self.group}

    @functools.cached_property
    def _values(self) -> dict[str, Symbol]:
        return dict(zip(self.pattern.outputs, self.pattern.values, strict=True))

    @functools.cached_property
    def _steps(self) -> list[Step]:
        """The steps behind the all_reduce that the live outputs need."""
        needed: set[int] = set()
        waiting = [self._values[name].step for name in self.live]
        while waiting:
            step = waiting.pop()
            if step is None or id(step) in needed:
                continue
            needed.add(id(step))
            waiting += [operand.step for operand in step.operands.values() if isinstance(operand, Symbol)]
        return [step for step in self.pattern.steps[1:] if id(step) in needed]

    @property
    def bare(self) -> bool:
        """Whether nothing follows the collective."""
        return not self._steps

    @property
    def reduces(self) -> bool:
        """Whether the collective is an all_reduce of x, which torch has a kernel for."""
        return self.pattern.collective == BARE

    def rest(self, reduced: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The live outputs, by the definition, from the sum and the tensors in the order of ``names``."""
        return self._behind((reduced,), dict(zip(self.names, others, strict=True)))

    def _behind(self, first: tuple[Tensor, ...], tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The live outputs, by the definition, from the results of the collective."""
        known: dict[int, Any] = {id(s): v for s, v in zip(self.pattern.steps[0].results, first, strict=True)}
        given = {**self._bound, **tensors}

        def value(operand: Any) -> Any:
            if not isinstance(operand, Symbol):
                return operand
            return given[operand.name] if operand.step is None else known[id(operand)]

        for step in self._steps:
            returned = step.operation.function(**{name: value(operand) for name, operand in step.operands.items()})
            results = returned if isinstance(returned, tuple | list) else (returned,)
            known |= {id(symbol): result for symbol, result in zip(step.results, results, strict=True)}
        return tuple(known[id(self._values[name])] for name in self.live)

    def definition(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The live outputs, by the definition."""
        return self._from(self.pattern.steps[0].operation.function, x, others, {GROUP: self.group})

    def alone(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The live outputs, by the definition, as in a group of one rank: nothing is sent."""
        function = self.pattern.steps[0].operation.alone
        assert function is not None
        return self._from(function, x, others, {})

    def _from(
        self, collective: Callable[..., Any], x: Tensor, others: Sequence[Tensor], more: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        given = {"x": x, **dict(zip(self.names, others, strict=True))}
        operands = self.pattern.steps[0].operands
        tensors = {name: given[o.name] for name, o in operands.items() if isinstance(o, Symbol) and o.name in given}
        first = collective(**tensors, **more)
        return self._behind(first if isinstance(first, tuple) else (first,), given)


@dataclass(eq=False)
class Epilogue:
    """What follows the all_reduce of a site, compiled once per form of tensors, for all token counts."""

    place: BoundPattern
    _compiled: dict[Form, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, reduced: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The live outputs. A capture without an earlier `prepare` runs operator by operator."""
        if self.place.bare:
            return (reduced,)
        # compiled for contiguous tensors only
        others = [each if each.is_contiguous() else each.contiguous() for each in others]
        found = self._compiled.get(_form(reduced, others))
        if found is None:
            if _cuda.is_capturing():
                return self.place.rest(reduced, *others)
            found = self.prepare(reduced, others)
        return tuple(found(reduced, *others))

    def prepare(self, reduced: Tensor, others: Sequence[Tensor]) -> Callable[..., Any]:
        """Compile for tensors of this form. Takes seconds the first time on a machine. Not allowed in a capture."""
        form = _form(reduced, others)
        if form not in self._compiled:
            places = [n for n, name in enumerate(self.place.names, 1) if name in self.place.pattern.elementwise]
            given = (reduced, *(each.contiguous() for each in others))
            self._compiled[form] = _cuda.run_on_own_thread(
                lambda: inductor.compile_rows(self.place.rest, given, (0, *places))
            )
        return self._compiled[form]


def _form(reduced: Tensor, others: Iterable[Tensor]) -> Form:
    """What a compilation is specialized to: everything but the leading sizes."""
    held = [(each.dtype, each.shape[-1] if each.dim() else 1, each.dim()) for each in others]
    return reduced.dtype, reduced.shape[-1], reduced.dim(), reduced.device, *held


class ExecutionPath:
    """One way to run a site, for tensors of any token count.

    Args:
        place: The pattern and what is bound.
        strategy: A strategy of the pattern, or of the bare all_reduce; None for torch's all_reduce.
        settings: The user's settings that the strategy takes, by name.
        rest: What follows the all_reduce, shared by the paths of one site; None for a new one.
        overwrites: Whether x may be overwritten if there is no strategy.
    """

    def __init__(
        self,
        place: BoundPattern,
        strategy: Strategy | None,
        settings: Mapping[str, Any] | None = None,
        rest: Epilogue | None = None,
        *,
        overwrites: bool = True,
    ) -> None:
        self.place = place
        self.strategy = strategy
        self.rest = Epilogue(place) if rest is None else rest
        self._impl: Callable[..., Any] = _all_reduce_in_place
        self._whole = strategy is not None and strategy.pattern == place.pattern.name
        self._constants: dict[str, Any] = {GROUP: place.group}
        self._wanted: list[int] = [0]
        if strategy is None and not place.reduces:
            self._whole = True
            self._impl = self._definition
            self._constants = {}
            self._wanted = list(range(len(place.live)))
            return
        if strategy is None:
            if not overwrites or "reduced" in place.live:
                self._impl = _all_reduce  # else x itself may be returned
            return
        pattern = place.pattern if self._whole else None
        self._impl = strategy.impl
        if pattern is not None:
            accepted = strategy.accepts(pattern)
            self._constants |= {name: value for name, value in place.scalars.items() if name in accepted}
            absent = (name for name in pattern.tensors if name not in ("x", *place.names))
            self._constants |= dict.fromkeys(absent)
            names = pattern.outputs if strategy.outputs is None else strategy.outputs
            self._wanted = [names.index(name) for name in place.live]
        if GROUP not in strategy.accepts(place.pattern):
            del self._constants[GROUP]
        self._constants |= settings or {}

    @property
    def needs_rest(self) -> bool:
        """Whether it runs the rest of the pattern behind an all_reduce."""
        return not self._whole and not self.place.bare

    def __call__(self, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The live outputs.

        Args:
            x: ``[..., n]``, this rank's part of the sum. Without a strategy it may be overwritten.
            others: The tensors in the order of `BoundPattern.names`.
        """
        if not self._whole:
            if self._impl is _all_reduce_in_place and (not x.is_contiguous() or _shares_memory(x, others)):
                x = x.clone(memory_format=torch.contiguous_format)
            return self.rest(self._kernel(x, {}), others)
        given = self._kernel(x, dict(zip(self.place.names, others, strict=True)))
        results = given if isinstance(given, tuple | list) else (given,)
        return tuple(results[index] for index in self._wanted)

    def _definition(self, x: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        return self.place.definition(x, *others.values())

    def _kernel(self, x: Tensor, others: Mapping[str, Tensor]) -> Any:
        try:
            return self._impl(x, **others, **self._constants)
        except BaseException as error:
            if self.strategy is not None:
                where = f"{self.place.pattern.name} of {tuple(x.shape)} in group {self.place.group!r}"
                blame(error, self.strategy.name, where)
            raise


def _shares_memory(x: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether overwriting x would change another input: a model may add its input to its own sum."""
    memory = x.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == memory for other in others)


def _all_reduce_in_place(x: Tensor, *, group: str) -> Tensor:
    """Without a copy, as Inductor reduces a buffer of its graph."""
    if (other := all_reduce_of(group)) is not None:
        return other(x)
    torch.ops._c10d_functional.all_reduce_(x, "sum", group)
    torch.ops._c10d_functional.wait_tensor(x)
    return x


def _all_reduce(x: Tensor, *, group: str) -> Tensor:
    if (other := all_reduce_of(group)) is not None:
        return other(x.clone())
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(reduced)
    return waited
