"""Operands of a reading that are not an argument's name, and the conditions of a reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_core.errors import PatternError, shown
from fusion_core.lift.algebra import same_size
from fusion_core.lift.operator_call import OperatorCall
from fusion_core.lift.term import Virtual
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta, dtype_name


@dataclass(frozen=True)
class Earlier:
    """An operand that is a result of an earlier word of the same operator.

    Attributes:
        result: The name of that word's result.
        otherwise: The argument to use instead if that word is left out (`Reading.when`).

    Example:
        ``acme::add_norm(Tensor x, Tensor y, float eps) -> (Tensor, Tensor)`` returns the norm of a sum, and the sum:

        >>> from fusion_core import Reading
        >>> readings = (
        ...     Reading("add", {"x": "x", "residual": "y"}, {"dtype": None}, {"sum": 1}),
        ...     Reading(
        ...         "rms_norm",
        ...         {"x": Earlier("sum"), "eps": "eps"},
        ...         {"weight": None, "weight_bias": 0.0, "dtype": None},
        ...         {"normed": 0},
        ...     ),
        ... )
    """

    result: str
    otherwise: str | None = None

    @property
    def sources(self) -> Iterator[int | str]:
        """The arguments that it names."""
        if self.otherwise is not None:
            yield self.otherwise

    def of(self, call: OperatorCall, earlier: Mapping[str, fx.Node | Virtual]) -> Any:
        """The operand in one call."""
        if self.result in earlier or self.otherwise is None:
            return earlier[self.result]
        return call.arguments[self.otherwise]


class _Function:
    """A function of some arguments and returned values, as far as they are known before run time."""

    def __init__(self, function: Callable[..., Any], *sources: int | str) -> None:
        self.function = function
        self.sources = sources

    def _value(self, call: OperatorCall) -> Any:
        lacking = [source for source in self.sources if source not in call.values]
        if lacking:
            return Reason("unknown", f"{lacking[0]} of {call.name} is unknown", "a tensor of its own")
        return self.function(*(call.values[source] for source in self.sources))

    def __repr__(self) -> str:  # no address: it is a part of the compile-cache key
        function = f"{self.function.__module__}.{self.function.__qualname__}"
        return f"{type(self).__name__}({', '.join((function, *map(repr, self.sources)))})"


class Derived(_Function):
    """An operand that is computed from arguments and returned values.

    Attributes:
        function: Takes a `TensorMeta` for each source that is a tensor, else the value. Returns the operand, or the
            `Reason` why the site must not be fused.
        sources: Names of arguments and indices of returned values.

    Example:
        >>> from fusion_core import TensorMeta
        >>> def dtype_of(output: TensorMeta) -> torch.dtype:
        ...     return output.dtype
        >>> dtype = Derived(dtype_of, "out")
    """

    def of(self, call: OperatorCall, earlier: Mapping[str, fx.Node | Virtual]) -> Any:
        """The operand in one call, or a reason against it."""
        return self._value(call)


class Check(_Function):
    """A condition on arguments and returned values.

    Attributes:
        function: As in `Derived`, but it returns a `Reason` if the operator means something else, else None.
        sources: Names of arguments and indices of returned values.

    Example:
        >>> from fusion_core import Reason, TensorMeta
        >>> def one_token(x: TensorMeta) -> Reason | None:
        ...     return None if x.shape[0] == 1 else Reason("tokens", f"x has {x.shape[0]} rows", "one")
        >>> need = Check(one_token, "x")
    """

    def unmet(self, call: OperatorCall) -> Reason | None:
        """Why one call does not meet the condition."""
        found = self._value(call)
        if found is None or isinstance(found, Reason):
            return found
        raise PatternError(f"reading of {call.name}: {self!r} gave {shown(found)}, needs a Reason or None")


@dataclass(frozen=True, init=False)
class Only:
    """A condition: an argument has one of these values; with any other the operator means something else.

    Example:
        >>> Only("scale_ub", None)
        Only(argument='scale_ub', values=(None,))
    """

    argument: str
    values: tuple[Any, ...]

    def __init__(self, argument: str, *values: Any) -> None:
        object.__setattr__(self, "argument", argument)
        object.__setattr__(self, "values", values)

    @property
    def sources(self) -> tuple[str, ...]:
        """The argument."""
        return (self.argument,)

    def unmet(self, call: OperatorCall) -> Reason | None:
        """Why one call does not meet the condition."""
        value = call.values.get(self.argument)
        if any(_equal(value, allowed) for allowed in self.values):
            return None
        text = f"a tensor, {value}" if isinstance(value, TensorMeta) else str(_name(value))
        needs = " or ".join(str(_name(allowed)) for allowed in self.values)
        return Reason(self.argument, f"{self.argument} of {call.name} is {text}", needs, self.argument)


def _equal(value: Any, allowed: Any) -> bool:
    """Whether a value is the allowed one, without a guard on a symbolic number. True does not equal 1."""
    if isinstance(allowed, tuple | list):
        lists = isinstance(value, tuple) and len(value) == len(allowed)
        return lists and all(map(_equal, value, allowed))
    if isinstance(value, torch.SymInt) and isinstance(allowed, int):
        return same_size(value, allowed)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def _name(value: Any) -> Any:
    return dtype_name(value) if isinstance(value, torch.dtype) else value
