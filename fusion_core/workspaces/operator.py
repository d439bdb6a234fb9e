"""An operator for a pattern, with the schema that follows from the pattern."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusion_core.errors import PatternError
from fusion_core.patterns.definition import GROUP, Pattern

_TYPES = {bool: "bool", int: "int", float: "float", str: "str", torch.dtype: "ScalarType"}


def register_operator(
    library: torch.library.Library,
    pattern: Pattern,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    name: str | None = None,
    scalars: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Any:
    """Define a functional operator that computes a pattern, and its fake.

    Its parameters are the pattern's tensors, the scalars, ``str group`` and the options; its results are the outputs.
    It passes all of them to ``run`` and ``fake`` by name, except options at their defaults: ``run`` has its own.
    It avoids the wrapper of `torch.library.custom_op`, which costs some 30 us per call.

    Args:
        library: Of the backend's namespace: ``torch.library.Library("fusion_acme", "DEF")``.
        pattern: The pattern.
        run: Returns the outputs, in order. It must not write into the tensors.
        fake: Returns uninitialised outputs with the shapes, dtypes and strides of ``run``'s.
        name: The operator's name; None for the pattern's.
        scalars: Names of the pattern's scalars that it takes; None for all.
        outputs: Names of the pattern's outputs that it returns; None for all.
        optional: Names of the pattern's tensors that may be None.
        options: Further parameters, in the syntax of a schema: ``"int? max_tokens=None"``.

    Returns:
        The operator's overload, for an ``impl`` to call.

    Raises:
        PatternError: if a schema has no type for a scalar.
    """
    name = pattern.name if name is None else name
    tensors = [f"Tensor{'?' if each in optional else ''} {each}" for each in pattern.tensors]
    scalars = pattern.scalars if scalars is None else scalars
    hints = _hints(pattern.function)
    parameters = [
        *tensors,
        *(f"{_type(pattern, each, hints[each])} {each}" for each in scalars),
        f"str {GROUP}",
        *options,
    ]
    results = ", ".join(f"Tensor {each}" for each in (pattern.outputs if outputs is None else outputs))
    library.define(f"{name}({', '.join(parameters)}) -> ({results})")
    names = [each.partition("=")[0].split()[-1] for each in parameters]
    library.impl(name, lambda *given: run(**dict(zip(names, given, strict=False))), "CompositeExplicitAutograd")
    # not by register_fake, which looks through all loaded modules
    library.impl(name, lambda *given: fake(**dict(zip(names, given, strict=False))), "Meta")
    return getattr(getattr(torch.ops, library.ns), name).default


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _type(pattern: Pattern, scalar: str, hint: Any) -> str:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = {each if isinstance(each, type) else type(typing.get_args(each)[0]) for each in parts}
    optional = "?" if type(None) in kinds else ""
    (kind, *others) = kinds - {type(None)}
    if others or kind not in _TYPES:
        known = ", ".join(each.__name__ for each in _TYPES)
        raise PatternError(f"{scalar} of pattern {pattern.name!r} is {hint}, needs one of {known}")
    return _TYPES[kind] + optional
