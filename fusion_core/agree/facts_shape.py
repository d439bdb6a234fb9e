"""A check that another rank's facts have the shape that this release of the library compares."""

from __future__ import annotations

from typing import Any

from fusion_core._json.shapes import anything, each, listed, names_with, text, text_or_none, truth

_loaded = names_with(
    **{"is": text, "with": each(text_or_none)},
    strategies=each(text),
    sources=text,
    reads=truth,
    unavailable=each(listed(text)),
)
_failed = names_with(failure=text)


def _backend(value: Any) -> str:
    return _failed(value) if isinstance(value, dict) and "failure" in value else _loaded(value)


misshapen = names_with(
    torch=text,
    device=text,
    config=each(anything),
    backends=each(_backend),
    table=listed(text_or_none, text),
)
"""The fault in the shape of facts; empty if there is none."""
