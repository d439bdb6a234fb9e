"""Sizes that are expressions of other sizes."""

from __future__ import annotations

from collections.abc import Mapping


def value_of(text: str, symbols: Mapping[str, int]) -> int:
    """The value of a size, given as torch prints it, for these values of its symbols."""
    import sympy  # slow to import
    from torch.utils._sympy import functions

    named = {name: sympy.Integer(size) for name, size in symbols.items()}
    return int(sympy.sympify(text, locals={**vars(functions), **named}))
