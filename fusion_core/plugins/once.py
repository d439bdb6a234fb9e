"""Warnings that a process gives once.

Python's own filter is meant to do this, but it forgets what it has shown whenever a `warnings.catch_warnings` block
ends, as one does in each compilation of torch.
"""

from __future__ import annotations

import warnings

_shown: set[str] = set()


def warn_once(words: str, stacklevel: int = 2) -> None:
    """Warn, unless this process has given the same warning before.

    Args:
        words: The text of the warning.
        stacklevel: As for `warnings.warn`, counted from the caller.
    """
    if words not in _shown:
        _shown.add(words)
        warnings.warn(f"fusion_core: {words}", RuntimeWarning, stacklevel + 1)


def forget() -> None:
    """Forget all warnings given so far, as if in a new process."""
    _shown.clear()
