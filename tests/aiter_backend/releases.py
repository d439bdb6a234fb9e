"""AITER's releases by their signatures, from aiter_api.json; and packages on disk that have them."""

import ast
import inspect
import json
from functools import cache
from inspect import Parameter
from pathlib import Path
from typing import Any

_API: dict[str, Any] = json.loads(Path(__file__).with_name("aiter_api.json").read_text(encoding="utf-8"))
_ENTRIES: dict[str, dict[str, Any]] = {entry["qualname"]: entry for entry in _API["entry_points"]}
_REMOVED: dict[str, dict[str, Any]] = {entry["qualname"]: entry for entry in _API["removed_entry_points"]}

ALL: tuple[str, ...] = tuple(_API["tags_compared"])
"""Every release whose signatures are known, from old to new; the last is the state of the main branch."""

SUPPORTED = ALL[ALL.index("v0.1.19.post2") :]
"""The releases that the backend works with."""

COMMUNICATOR = "dist/device_communicators/custom_all_reduce.py"

_MUST_NOT_RUN = 'raise RuntimeError("this must not be imported")\n'


def names(release: str) -> list[str]:
    """What a release's module of CustomAllreduce has: functions, and methods as "CustomAllreduce.close"."""
    return [name for name in _ENTRIES | _REMOVED if _text(name, release) is not None]


@cache
def signature(qualname: str, release: str) -> inspect.Signature | None:
    """A function's or (with self) method's signature; None where the release has none of that name.

    Without annotations. A name that no release has is a KeyError.
    """
    text = _text(qualname, release)
    if text is None:
        return None
    (function,) = ast.parse(f"def f{text}: ...").body
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    assert [*arguments.posonlyargs, arguments.vararg, arguments.kwarg] == [None, None]  # no release has such
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [*arguments.defaults]
    parameters = [
        Parameter(argument.arg, kind, default=Parameter.empty if default is None else _value(default))
        for kind, some, their_defaults in (
            (Parameter.POSITIONAL_OR_KEYWORD, arguments.args, defaults),
            (Parameter.KEYWORD_ONLY, arguments.kwonlyargs, arguments.kw_defaults),
        )
        for argument, default in zip(some, their_defaults, strict=True)
    ]
    return inspect.Signature(parameters)


def write_package(folder: Path, release: str) -> Path:
    """A package `aiter` with a release's signatures and nothing behind them, which raises when imported."""
    root = folder / "aiter"
    _write(root / "__init__.py", _MUST_NOT_RUN)
    _write(root / "jit" / "core.py", _MUST_NOT_RUN)
    if names(release):
        _write(root / COMMUNICATOR, source(release))
    return root


def source(release: str) -> str:
    """The module of CustomAllreduce with a release's signatures and nothing behind them."""
    functions = ["from contextlib import contextmanager\n", "from typing import Optional\n", _MUST_NOT_RUN]
    methods = ["class CustomAllreduce:\n"]
    for name in names(release):
        owner, _, plain = name.rpartition(".")
        lines = [f"@{decorator}" for decorator in _ENTRIES.get(name, {}).get("decorators", [])]
        lines += [f"def {plain}{_text(name, release)}:", "    raise NotImplementedError"]
        indent = "    " if owner else ""
        (methods if owner else functions).append("\n" + "".join(f"{indent}{line}\n" for line in lines))
    return "".join([*functions, "\n", *methods])


def write_unrelated(folder: Path) -> Path:
    """The package of the name aiter on the public index: a few modules for async iterators."""
    root = folder / "aiter"
    for module in ("__init__", "map_aiter", "server"):
        _write(root / f"{module}.py", _MUST_NOT_RUN)
    return root


def _text(qualname: str, release: str) -> str | None:
    at = ALL.index(release)
    if (removed := _REMOVED.get(qualname)) is not None:
        there = ALL.index(removed["first"]) <= at <= ALL.index(removed["last"])
        return removed["last_signature"] if there else None
    found = None
    for change in _ENTRIES[qualname]["signature_history"]:
        if ALL.index(change["tag"]) <= at:
            found = change["signature"]
    return found


def _value(default: ast.expr) -> Any:
    return eval(compile(ast.Expression(default), "aiter_api.json", "eval"), {"__builtins__": {}})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
