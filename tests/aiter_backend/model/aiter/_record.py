"""What was called, and how: `calls`."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

calls: list[dict[str, Any]] = []
"""One entry for each call from outside of a method of `CustomAllreduce`, in order, also for one that raised.

Keys: ``method``; ``args`` and ``kwargs`` exactly as given; ``outputs``, None where there are none; ``error``, the text
of what was raised, or None. A tensor stands as a dict of ``shape``, ``dtype``, ``stride`` and ``is_contiguous``, an
object as the name of its type. Nothing refers to this package, so entries can be pickled and sent anywhere.
"""


def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, entered in `calls` unless another one of the same object called it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._depth:
            return method(self, *args, **kwargs)
        entry = {"method": method.__name__, "args": _plain(args), "kwargs": _plain(kwargs), "outputs": None}
        entry["error"] = None
        calls.append(entry)
        self._depth += 1
        try:
            result = method(self, *args, **kwargs)
        except BaseException as error:
            entry["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._depth -= 1
        entry["outputs"] = _plain(result)
        return result

    return call


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {
            "shape": tuple(value.shape),
            "dtype": value.dtype,
            "stride": value.stride(),
            "is_contiguous": value.is_contiguous(),
        }
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(each) for each in value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
