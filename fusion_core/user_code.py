"""Finds and calls the function that a user names as ``MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from fusion_core.errors import ConfigError

_OWN = str(Path(__file__).parent)


@dataclass(frozen=True)
class Call:
    """A model and the arguments to call it with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def find(spec: str) -> Callable[[], Any]:
    """The function that ``MODULE:FUNCTION`` or ``file.py:FUNCTION`` names.

    Raises:
        ConfigError: if there is none.
    """
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name):
        raise ConfigError(f"{spec!r} names no function, needs MODULE:FUNCTION or file.py:FUNCTION")
    module = _load(source)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        found = f"{name!r} in {source!r} is {function!r}" if hasattr(module, name) else f"{source!r} has no {name!r}"
        raise ConfigError(f"{found}, needs a function; it has {', '.join(own) or 'none'}")
    found_function: Callable[[], Any] = function
    return found_function


def _load(source: str) -> ModuleType:
    path = Path(source)
    if path.suffix == ".py" and not path.is_file():
        raise ConfigError(f"file {source!r} does not exist, needs MODULE:FUNCTION or file.py:FUNCTION")
    sys.path.insert(0, str(path.resolve().parent if path.suffix == ".py" else Path.cwd()))
    try:
        return _load_file(path) if path.suffix == ".py" else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        where = _place(error.__traceback__)
        raise ConfigError(f"{source!r} cannot be imported: {type(error).__name__}: {error}{where}") from error


def _load_file(path: Path) -> ModuleType:
    name = path.stem if path.stem not in sys.modules else f"_{path.stem}_of_the_user"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up the module by its name
    spec.loader.exec_module(module)
    return module


def _place(trace: TracebackType | None) -> str:
    """The line of the user's code that raised, as text; empty if other code raised."""
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith((_OWN, "<frozen"))]
    theirs = [frame for frame in frames if Path(importlib.__file__).parent.as_posix() not in frame.filename]
    return f" (at {theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""


def as_call(returned: Any, spec: str) -> Call:
    """The return value of the user's function as a call.

    Raises:
        ConfigError: if it is not ``(model, args)`` or ``(model, args, kwargs)``.
    """
    needs = "(model, args) or (model, args, kwargs) with a tuple and a dict"
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise ConfigError(f"{spec} returned {type(returned).__name__}{size}, needs {needs}")
    model, args, kwargs = (*returned, {})[:3]
    if not callable(model) or not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        raise ConfigError(f"{spec} returned ({', '.join(type(each).__name__ for each in returned)}), needs {needs}")
    return Call(model, tuple(args), kwargs)
