"""What the installed AITER offers, read from its source: importing it runs compilers, and raises without ROCm."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from inspect import Parameter
from pathlib import Path

COMMUNICATOR = Path("dist", "device_communicators", "custom_all_reduce.py")
"""Where ``CustomAllreduce`` is defined."""

MARKERS = (COMMUNICATOR, Path("jit", "core.py"))
"""Files of AMD's package. Early releases lack the first; the unrelated package of the same name has neither."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a method is called: the number of its positional arguments, and the names of the others."""

    positional: int = 0
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """AMD's AITER as it is installed.

    Attributes:
        root: The package's folder.
        names: What the module of ``CustomAllreduce`` defines or imports; empty if there is no such module.
        methods: The methods of ``CustomAllreduce``, without ``self``; more than one signature if a condition
            at import selects the definition.
    """

    root: Path
    names: frozenset[str]
    methods: Mapping[str, tuple[inspect.Signature, ...]]

    def takes(self, method: str, keyword: str) -> bool:
        """Whether a method exists and has a parameter of this name."""
        return method in self.methods and all(keyword in signature.parameters for signature in self.methods[method])

    def problem(self, method: str, call: Call) -> str | None:
        """The reason why a method cannot be called in this way, or None."""
        if method not in self.methods:
            return "is not there"
        for signature in self.methods[method]:
            try:
                signature.bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
            except TypeError as error:
                return f"cannot be called as it is here: {error}"
        return None


@dataclass(frozen=True, slots=True)
class NotAmds:
    """Something else that is importable as ``aiter``.

    Attributes:
        place: Its folder or file.
        checkout: Whether it is the root of a checkout of AMD's repository, which is importable by the same name.
    """

    place: Path
    checkout: bool = False


@dataclass(frozen=True, slots=True)
class Unreadable:
    """AMD's AITER, with a file that cannot be read or parsed."""

    path: Path
    problem: str


def installed() -> Source | NotAmds | Unreadable | None:
    """What ``import aiter`` would find, as far as its files show; None if it would find nothing."""
    spec = _spec()
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    for place in places:
        if _is_amds(place):
            return _read(place)
    place = places[0] if places else Path(spec.origin or "aiter")
    return NotAmds(place, checkout=_is_amds(place / "aiter"))


def _spec() -> ModuleSpec | None:
    try:
        return find_spec("aiter")
    except ValueError:  # a module of this name without a spec was put into sys.modules
        return PathFinder.find_spec("aiter")
    except ModuleNotFoundError:
        return None


def _is_amds(place: Path) -> bool:
    return any(os.path.isfile(place / marker) for marker in MARKERS)  # unlike Path's, never raises


def _read(root: Path) -> Source | Unreadable:
    path = root / COMMUNICATOR
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Source(root, frozenset(), {})
    except OSError as error:
        return Unreadable(path, error.strerror or str(error))
    return _parsed(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, mtime: int, size: int) -> Source | Unreadable:
    """The parsed file; its time and size are in the key, so that an upgrade under a running process is read again."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes: not ours to report
            body = ast.parse(path.read_bytes()).body
        methods = _methods("CustomAllreduce", _classes(body))
    except OSError as error:
        return Unreadable(path, error.strerror or str(error))
    except SyntaxError as error:
        return Unreadable(path, f"{error.msg} (line {error.lineno})")
    except (ValueError, RecursionError) as error:
        return Unreadable(path, str(error))
    return Source(path.parents[2], frozenset(name for name, _, _ in _definitions(body)), methods)


def _definitions(body: Sequence[ast.stmt], conditional: bool = False) -> Iterator[tuple[str, ast.stmt, bool]]:
    """The names that a body binds, with their statements, and whether they are inside a conditional block."""
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name, statement, conditional
            case ast.Import() | ast.ImportFrom():
                for alias in statement.names:
                    yield alias.asname or alias.name.partition(".")[0], statement, conditional
            case ast.Assign() | ast.AnnAssign():
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for node in (node for target in targets for node in ast.walk(target)):
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                        yield node.id, statement, conditional
            case _:
                for block in _blocks(statement):
                    yield from _definitions(block, conditional=True)


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The blocks of an ``if``, ``try``, ``with``, loop or ``match``."""
    for part in ("body", "orelse", "finalbody"):
        yield getattr(statement, part, [])
    for part in ("handlers", "cases"):
        for branch in getattr(statement, part, []):
            yield branch.body


def _classes(body: Sequence[ast.stmt]) -> dict[str, list[ast.ClassDef]]:
    found: dict[str, list[ast.ClassDef]] = {}
    for name, statement, conditional in _definitions(body):
        if isinstance(statement, ast.ClassDef):
            found[name] = [*found.get(name, []), statement] if conditional else [statement]
    return found


def _methods(name: str, classes: Mapping[str, list[ast.ClassDef]]) -> dict[str, tuple[inspect.Signature, ...]]:
    """A class's methods by name, including those inherited from bases in the same module."""
    others = {other: found for other, found in classes.items() if other != name}  # a class is not its own base
    methods: dict[str, tuple[inspect.Signature, ...]] = {}
    for definition in classes.get(name, []):
        own: dict[str, tuple[inspect.Signature, ...]] = {}
        for base in reversed(definition.bases):
            if isinstance(base, ast.Name):
                own |= _methods(base.id, others)
        for method, statement, conditional in _definitions(definition.body):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and not _decorated(statement, "overload"):
                own[method] = (*(own.get(method, ()) if conditional else ()), _signature(statement))
        for method, signatures in own.items():
            methods[method] = (*methods.get(method, ()), *signatures)
    return methods


def _decorated(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> bool:
    return any(ast.unparse(decorator).rpartition(".")[2] == name for decorator in function.decorator_list)


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> inspect.Signature:
    """The signature of the bound method; a default is its source text."""
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + [*arguments.defaults]
    kinds: list[inspect._ParameterKind] = [Parameter.POSITIONAL_ONLY] * len(arguments.posonlyargs)
    kinds += [Parameter.POSITIONAL_OR_KEYWORD] * len(arguments.args)
    parameters = [_parameter(*parts) for parts in zip(plain, kinds, defaults, strict=True)]
    if not _decorated(function, "staticmethod"):
        del parameters[:1]
    if arguments.vararg:
        parameters.append(_parameter(arguments.vararg, Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(_parameter(argument, Parameter.KEYWORD_ONLY, default))
    if arguments.kwarg:
        parameters.append(_parameter(arguments.kwarg, Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _parameter(argument: ast.arg, kind: inspect._ParameterKind, default: ast.expr | None = None) -> Parameter:
    return Parameter(argument.arg, kind, default=Parameter.empty if default is None else ast.unparse(default))
