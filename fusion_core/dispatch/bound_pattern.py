"""A pattern at one place: everything is bound but its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.vocabulary.operation import Step, Symbol

BARE = "all_reduce"


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
        return self.behind((reduced,), dict(zip(self.names, others, strict=True)))

    def behind(self, first: tuple[Tensor, ...], tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
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
        return self.behind(first if isinstance(first, tuple) else (first,), given)
