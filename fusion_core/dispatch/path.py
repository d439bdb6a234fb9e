"""One way to run a site outside of a graph: a strategy, or torch's all_reduce and one kernel for what follows it.

In a graph of fixed sizes, Inductor compiles what surrounds a strategy. An operator that chooses at run time has to
provide that itself: the rest of the pattern behind the all_reduce is compiled by Inductor, once for all token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusion_core import _cuda
from fusion_core._torch import inductor
from fusion_core.dispatch.bound_pattern import BoundPattern
from fusion_core.dispatch.means import function_of, runs_inside
from fusion_core.errors import blame
from fusion_core.groups import all_reduce_of
from fusion_core.patterns.definition import GROUP
from fusion_core.plugins.strategy import Strategy

Form = tuple[Any, ...]


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
        if runs_inside(strategy, place.pattern):
            self._whole = True
            self._impl = _without_parts(strategy.impl)
            self._constants |= settings or {}
            return
        self._impl = function_of(strategy, place.pattern)
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


def _without_parts(impl: Callable[..., Any]) -> Callable[..., Any]:
    """A strategy that reduces means, as the function of a pattern that also has what they are of."""
    return lambda x, part, y_part=None, **constants: impl(x, **constants)


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
