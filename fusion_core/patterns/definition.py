"""A fusible computation, defined by a plain torch function over the neutral vocabulary."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fusion_core.errors import PatternError
from fusion_core.vocabulary.operation import Recorder, Step, Symbol

GROUP = "group"
"""The parameter of every pattern that names the process group."""
VECTORS = ("weight", "post_weight", "bias")
"""Tensor parameters of shape [n], in every pattern that has them."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a pattern: a tensor or a scalar.

    Attributes:
        name: Its name.
        is_tensor: Whether it is a tensor.
        required: Whether it has no default.
        default: Its default.
        optional: Whether it may be None, such as the weight of a norm without one.
    """

    name: str
    is_tensor: bool
    required: bool = True
    default: Any = None
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Pattern:
    """A fusible computation: search graph, oracle and fallback in one function.

    The function takes tensors, scalars and the keyword ``group``. It calls only words of the vocabulary, starts from
    one collective, such as ``all_reduce``, and returns every value that code outside a site may use, in the order of
    ``outputs``. Called with float64 tensors it is the oracle.

    Attributes:
        function: The definition. Its name is the pattern's name.
        outputs: Names of the results, in order.
        returns: The outputs that the eager function of the same name returns by default.
        example: For `fusion_core.testing`: a function of x's shape and dtype that returns a `TensorMeta` or value for
            each parameter that the kit cannot generate (it generates ``x``, the residual, ``weight``, ``bias``,
            ``scale``, ``global_scale``, ``eps`` and parameters with defaults). None if there is no such parameter.
        parameters: Its parameters except ``group``, by name.
        steps: The recorded definition, one step per operation; the first is the collective.
    """

    function: Callable[..., Any]
    outputs: tuple[str, ...]
    returns: tuple[str, ...]
    example: Callable[[tuple[int, ...], torch.dtype], dict[str, Any]] | None = None
    parameters: dict[str, Parameter] = field(init=False)
    positional: tuple[str, ...] = field(init=False)
    tensors: tuple[str, ...] = field(init=False)
    """Names of the tensor parameters, in order."""
    scalars: tuple[str, ...] = field(init=False)
    """Names of the scalar parameters, in order."""
    steps: tuple[Step, ...] = field(init=False)
    values: tuple[Symbol, ...] = field(init=False)
    """The symbol of each output, in the order of ``outputs``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _parameters(self.function))
        # plain attributes, not cached properties, whose lock Dynamo cannot trace: `bind` runs inside compiled models
        parameters = inspect.signature(self.function).parameters.values()
        by_position = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY and p.name != GROUP]
        object.__setattr__(self, "positional", tuple(by_position))
        named = {kind: tuple(p.name for p in self.parameters.values() if p.is_tensor is kind) for kind in (True, False)}
        object.__setattr__(self, "tensors", named[True])
        object.__setattr__(self, "scalars", named[False])
        steps, values = _record(self)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "values", values)
        if unknown := [name for name in self.returns if name not in self.outputs]:
            raise PatternError(f"pattern {self.name!r} returns {unknown}, needs names among its outputs {self.outputs}")

    @property
    def name(self) -> str:
        """The pattern's name."""
        return self.function.__name__

    @functools.cached_property
    def elementwise(self) -> frozenset[str]:
        """Tensor parameters that are added to x or to a value computed from it, and so have its shape."""
        added = (operand for step in self.steps if step.operation.commutative for operand in step.operands.values())
        return frozenset(o.name for o in added if isinstance(o, Symbol) and o.step is None) & frozenset(self.tensors)

    @property
    def collective(self) -> str:
        """The word that it starts from."""
        return self.steps[0].operation.name

    @property
    def by_rank(self) -> bool:
        """Whether its results are of each rank's own part of a vector."""
        return self.steps[0].operation.by_rank

    @property
    def words(self) -> tuple[str, ...]:
        """Names of its operations, in order."""
        return tuple(step.operation.name for step in self.steps)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, without ``group``, with defaults filled in.

        Raises:
            TypeError: The arguments do not fit the definition.
        """
        positional = self.positional
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        missing = [p.name for p in self.parameters.values() if p.required and p.name not in given]
        unknown = [name for name in kwargs if name not in self.parameters or name in positional[: len(args)]]
        if missing or unknown or len(args) > len(positional):
            found = f"{len(args)} positional arguments and {', '.join(kwargs) or 'no keywords'}"
            raise TypeError(f"{self.name} got {found}, needs {self.signature()}")
        return {name: given.get(name, parameter.default) for name, parameter in self.parameters.items()}

    def signature(self) -> str:
        """The definition's head, for messages."""
        return f"{self.name}{inspect.signature(self.function, eval_str=True)}"

    def __repr__(self) -> str:
        return f"Pattern({self.name!r})"


def pattern(
    *,
    outputs: tuple[str, ...],
    returns: tuple[str, ...] | None = None,
    example: Callable[[tuple[int, ...], torch.dtype], dict[str, Any]] | None = None,
) -> Callable[[Callable[..., Any]], Pattern]:
    """Decorator that makes a function a pattern, named after the function.

    Args:
        outputs: Names of the results, in order.
        returns: The outputs that the eager function returns by default; None for all.
        example: See `Pattern`.

    Example:
        >>> from fusion_core.vocabulary import add, all_reduce
        >>> @pattern(outputs=("total", "reduced"))
        ... def all_reduce_add(x: torch.Tensor, residual: torch.Tensor, *, group: str) -> tuple[torch.Tensor, ...]:
        ...     reduced = all_reduce(x, group)
        ...     return add(reduced, residual), reduced
        >>> all_reduce_add
        Pattern('all_reduce_add')
        >>> all_reduce_add.words
        ('all_reduce', 'add')
    """
    return lambda function: Pattern(function, outputs, outputs if returns is None else returns, example)


def _parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    name = getattr(function, "__name__", repr(function))
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise PatternError(f"pattern {name!r}: {error}, needs annotations that can be resolved") from error
    signature = inspect.signature(function)
    if GROUP not in signature.parameters:
        raise PatternError(f"pattern {name!r} is {name}{signature}, needs a parameter {GROUP!r}")
    parameters = {}
    for parameter in signature.parameters.values():
        if parameter.name == GROUP:
            continue
        if parameter.name not in hints:
            raise PatternError(
                f"pattern {name!r}: parameter {parameter.name!r} has no annotation, needs torch.Tensor or a scalar type"
            )
        hint = hints[parameter.name]
        is_tensor = hint is torch.Tensor or torch.Tensor in typing.get_args(hint)
        required = parameter.default is inspect.Parameter.empty
        default = None if required else parameter.default
        parameters[parameter.name] = Parameter(
            parameter.name, is_tensor, required, default, type(None) in typing.get_args(hint)
        )
    return parameters


def _record(pattern: Pattern) -> tuple[tuple[Step, ...], tuple[Symbol, ...]]:
    symbols = {name: Symbol(name) for name in (*pattern.parameters, GROUP)}
    try:
        with Recorder() as recorder:
            returned = pattern.function(**symbols)
    except (TypeError, AttributeError) as error:
        raise PatternError(
            f"pattern {pattern.name!r} cannot be read: {error}; it needs to call words of the vocabulary only"
        ) from error
    values = returned if isinstance(returned, tuple) else (returned,)
    if len(values) != len(pattern.outputs) or not all(isinstance(value, Symbol) and value.step for value in values):
        raise PatternError(
            f"pattern {pattern.name!r} returns {len(values)} values, needs {pattern.outputs}, each a word's result"
        )
    words = [step.operation.name for step in recorder.steps]
    collectives = [step.operation.alone is not None for step in recorder.steps]
    if collectives[:1] != [True] or sum(collectives) != 1:
        needs = "exactly one collective word, such as all_reduce, and that first"
        raise PatternError(f"pattern {pattern.name!r} is made of {words}, needs {needs}")
    operands = recorder.steps[0].operands
    if operands["x"] is not symbols.get("x") or operands["group"] is not symbols[GROUP]:
        raise PatternError(
            f"pattern {pattern.name!r} calls {words[0]} of {operands}, needs {words[0]}(x, {GROUP}) of its parameters"
        )
    for step in recorder.steps[1:]:
        if not any(isinstance(operand, Symbol) and operand.step is not None for operand in step.operands.values()):
            raise PatternError(f"pattern {pattern.name!r}: {step.operation.name} takes nothing that comes before it")
    return tuple(recorder.steps), values
