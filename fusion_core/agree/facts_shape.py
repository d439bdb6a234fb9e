"""Whether facts that another rank gave have the shape that this release of the library compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Shape = Callable[[Any], str]
"""From a value to what is wrong with it; empty where nothing is."""


def _text(value: Any) -> str:
    return "" if isinstance(value, str) else f"is {type(value).__name__}, needs text"


def _text_or_none(value: Any) -> str:
    return "" if value is None else _text(value)


def _truth(value: Any) -> str:
    return "" if isinstance(value, bool) else f"is {type(value).__name__}, needs true or false"


def _anything(value: Any) -> str:
    return ""


def _each(shape: Shape) -> Shape:
    """Names, and a value of one shape for each."""

    def problem(value: Any) -> str:
        if not isinstance(value, dict):
            return f"is {type(value).__name__}, needs names with values"
        return next((f"{name}: {found}" for name, each in value.items() if (found := shape(each))), "")

    return problem


def _listed(*shapes: Shape) -> Shape:
    """A list of one value for each shape, or of any length for a single one."""

    def problem(value: Any) -> str:
        if not isinstance(value, list):
            return f"is {type(value).__name__}, needs a list"
        if len(shapes) > 1 and len(value) != len(shapes):
            return f"has {len(value)} values, needs {len(shapes)}"
        given = zip(value, shapes if len(shapes) > 1 else shapes * len(value), strict=True)
        return next((found for each, shape in given if (found := shape(each))), "")

    return problem


def _with(**shapes: Shape) -> Shape:
    """Names, among them all of these."""

    def problem(value: Any) -> str:
        if found := _each(_anything)(value):
            return found
        if missing := next((name for name in shapes if name not in value), None):
            return f"{missing} is missing"
        return next((f"{name} {found}" for name, shape in shapes.items() if (found := shape(value[name]))), "")

    return problem


_loaded = _with(
    **{"is": _text, "with": _each(_text_or_none)},
    strategies=_each(_text),
    sources=_text,
    reads=_truth,
    unavailable=_each(_listed(_text)),
)
_failed = _with(failure=_text)


def _backend(value: Any) -> str:
    return _failed(value) if isinstance(value, dict) and "failure" in value else _loaded(value)


misshapen = _with(
    torch=_text,
    device=_text,
    config=_each(_anything),
    backends=_each(_backend),
    table=_listed(_text_or_none, _text),
)
"""What is wrong with the shape of facts; empty where nothing is."""
