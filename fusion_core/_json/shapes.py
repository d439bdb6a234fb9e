"""Shapes of plain JSON values, to check a value that another process wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Shape = Callable[[Any], str]
"""A function from a value to its problem, as text; empty if there is none."""


def text(value: Any) -> str:
    """Text."""
    return "" if isinstance(value, str) else f"is {type(value).__name__}, needs text"


def text_or_none(value: Any) -> str:
    """Text or null."""
    return "" if value is None else text(value)


def truth(value: Any) -> str:
    """True or false."""
    return "" if isinstance(value, bool) else f"is {type(value).__name__}, needs true or false"


def anything(value: Any) -> str:
    """Any value."""
    return ""


def each(shape: Shape) -> Shape:
    """An object whose values all have one shape."""

    def problem(value: Any) -> str:
        if not isinstance(value, dict):
            return f"is {type(value).__name__}, needs names with values"
        return next((f"{name}: {found}" for name, one in value.items() if (found := shape(one))), "")

    return problem


def listed(*shapes: Shape) -> Shape:
    """A list with one value per shape; given one shape, a list of any length."""

    def problem(value: Any) -> str:
        if not isinstance(value, list):
            return f"is {type(value).__name__}, needs a list"
        if len(shapes) > 1 and len(value) != len(shapes):
            return f"has {len(value)} values, needs {len(shapes)}"
        given = zip(value, shapes if len(shapes) > 1 else shapes * len(value), strict=True)
        return next((found for one, shape in given if (found := shape(one))), "")

    return problem


def names_with(**shapes: Shape) -> Shape:
    """An object with at least these names."""

    def problem(value: Any) -> str:
        if found := each(anything)(value):
            return found
        if missing := next((name for name in shapes if name not in value), None):
            return f"{missing} is missing"
        return next((f"{name} {found}" for name, shape in shapes.items() if (found := shape(value[name]))), "")

    return problem
