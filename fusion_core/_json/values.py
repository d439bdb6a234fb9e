"""Values as JSON and back."""

from __future__ import annotations

import json
from typing import Any

import torch


def parse(text: bytes | str, *, strict: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: The text; bytes are UTF-8.
        strict: Whether to refuse repeated keys, NaN and infinities, as the standard does.

    Raises:
        ValueError: if it is not JSON, or nested too deeply to be read.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number) if strict else json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in an object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def encode_scalar(value: Any) -> Any:
    """A scalar of a pattern as a plain JSON type: a number, text, a truth value, None or a dtype.

    Raises:
        TypeError: for any other value.
    """
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a scalar is {value!r}, needs a number, text, a dtype or None")


def decode_scalar(value: Any) -> Any:
    """The scalar that `encode_scalar` encoded."""
    return getattr(torch, value["dtype"]) if isinstance(value, dict) else value
