"""Warnings that a process gives once.

Python's own filter means to, and forgets what it has shown whenever somebody leaves `warnings.catch_warnings`, as torch
does in each compilation.
"""

from __future__ import annotations

import warnings

_said: set[str] = set()


def warn_once(words: str, stacklevel: int = 2) -> None:
    """Warn, unless this process has said the same before.

    Args:
        words: What is wrong.
        stacklevel: As of `warnings.warn`, seen from the caller.
    """
    if words not in _said:
        _said.add(words)
        warnings.warn(f"fusion_core: {words}", RuntimeWarning, stacklevel + 1)


def forget() -> None:
    """Begin anew, as another process would."""
    _said.clear()
