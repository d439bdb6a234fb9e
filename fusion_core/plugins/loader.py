"""Loads plugins by their entry points, one at a time: a broken one is named, and never hides the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pluggy

from fusion_core.errors import BackendError, FusionError, described
from fusion_core.lift.dialect import Dialect, Refusal
from fusion_core.lift.operands import Earlier
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.declarations import check_fields, check_printable
from fusion_core.plugins.hooks import Hooks
from fusion_core.plugins.sources import OWN, libraries, name_and_version, plugin_sources
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.vocabulary import Operation


@dataclass(frozen=True)
class Backend:
    """One loaded plugin and what it declared."""

    name: str
    plugin: ModuleType | Any
    hooks: Hooks = field(repr=False, compare=False)
    strategies: tuple[Strategy, ...] = ()
    """The strategies, with each variant as one of its own."""
    patterns: tuple[Pattern, ...] = ()
    dialects: tuple[Dialect, ...] = ()
    distribution: str = ""
    """``name version`` of the distribution that its entry point came from."""
    module: str = ""
    """The module that its entry point names."""
    sources: str = ""
    """A hash of all its files, as they were when it was loaded."""
    declared: tuple[Strategy, ...] = ()
    """The strategies as it declared them, with their variants."""

    @property
    def libraries(self) -> dict[str, str | None]:
        """The versions of the distributions that its own requires."""
        return libraries(self.distribution, self.name)


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that is not used, and why."""

    backend: str
    reason: Reason

    def __str__(self) -> str:
        return f"backend {self.backend!r} not loaded: {self.reason}"


def load_all(points: list[EntryPoint]) -> tuple[dict[str, Backend], list[LoadFailure]]:
    """The backends of these entry points by name, loaded and checked, and why each of the others is not used."""
    loaded: dict[str, Backend] = {}
    failures: list[LoadFailure] = []
    taken: dict[str, str] = {pattern.name: "fusion_core" for pattern in CORE_PATTERNS}
    by_name: dict[str, list[EntryPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # one broken plugin must never hide the others, nor end the process
            loaded.pop(name, None)
            failures.append(LoadFailure(name, _failure(error)))

    for name, candidates in by_name.items():
        if own := [point for point in candidates if _is_in_tree(point)]:
            for imposter in (point for point in candidates if point.value != own[0].value):
                found = f"{_owner(imposter)} takes the name of the in-tree backend {name!r}"
                failures.append(
                    LoadFailure(name, Reason("name", found, "a name of its own", hint=f"{name!r} itself loads"))
                )
            candidates = own
        attempt(name, lambda name=name, candidates=candidates: loaded.update({name: _load(name, candidates)}))  # type: ignore[misc]
    for name in sorted(loaded):
        attempt(name, lambda name=name: _check_patterns(loaded[name], taken))  # type: ignore[misc]
    for name in sorted(loaded):
        known = _known(loaded)
        attempt(name, lambda name=name, known=known: _check_strategies(loaded[name], known))  # type: ignore[misc]
    for name in sorted(loaded):
        words = {s.operation.name: s.operation for p in _known(loaded).values() for s in p.steps}
        attempt(name, lambda name=name, words=words: _check_readings(loaded[name], words))  # type: ignore[misc]
    return loaded, sorted(failures, key=lambda failure: failure.backend)


def _known(loaded: dict[str, Backend]) -> dict[str, Pattern]:
    """Core's patterns and those of the backends that have not failed."""
    return {p.name: p for p in CORE_PATTERNS} | {p.name: p for b in loaded.values() for p in b.patterns}


def _failure(error: BaseException) -> Reason:
    if isinstance(error, FusionError):
        return Reason("declaration", described(error).removeprefix(f"{type(error).__name__}: "))
    if isinstance(error, pluggy.PluginValidationError):
        return Reason("hook", described(error).removeprefix(f"{type(error).__name__}: "))
    return Reason("import" if isinstance(error, ImportError) else "error", described(error))


def _load(name: str, candidates: list[EntryPoint]) -> Backend:
    if len({point.value for point in candidates}) > 1:
        owners = ", ".join(map(_owner, candidates))
        raise BackendError(
            f"the name is taken by {len(candidates)} entry points, {owners}; needs a name of its own for each"
        )
    point = candidates[0]
    check_printable("the entry point's name", name)
    plugin = point.load()
    hooks = Hooks(plugin, name)
    declared = tuple(hooks.items("fusion_strategies", Strategy))
    for strategy in declared:
        check_fields(strategy)
    return Backend(
        name,
        plugin,
        hooks,
        tuple(each for strategy in declared for each in strategy.expanded()),
        tuple(hooks.items("fusion_patterns", Pattern)),
        tuple(hooks.items("fusion_dialects", Dialect)),
        _distribution(point),
        point.module,
        plugin_sources(point.module, point.dist),
        declared,
    )


def _is_in_tree(point: EntryPoint) -> bool:
    """Whether an entry point came with fusion_core itself; no other distribution can have its name."""
    from packaging.utils import canonicalize_name  # takes some ms, which `import fusion_core` need not spend

    return point.dist is not None and canonicalize_name(name_and_version(point.dist)[0]) == OWN


def _owner(point: EntryPoint) -> str:
    return f"{point.value} ({_distribution(point) or 'unknown distribution'})"


def _distribution(point: EntryPoint) -> str:
    return " ".join(name_and_version(point.dist)) if point.dist is not None else ""


def _check_patterns(backend: Backend, taken: dict[str, str]) -> None:
    own: dict[str, str] = {}
    for pattern in backend.patterns:
        check_printable("the name of a pattern", pattern.name)
        for output in pattern.outputs:
            check_printable(f"an output of pattern {pattern.name!r}", output)
        if owner := (taken | own).get(pattern.name):
            raise BackendError(f"pattern {pattern.name!r} is defined by {owner!r} already, needs another name")
        own[pattern.name] = backend.name
    taken.update(own)


def _check_strategies(backend: Backend, patterns: dict[str, Pattern]) -> None:
    seen: set[str] = set()
    for strategy in backend.strategies:
        prefix, dot, rest = strategy.name.partition(".")
        if not (prefix == backend.name and dot and rest):
            raise BackendError(
                f"strategy {strategy.name!r} of backend {backend.name!r} is misnamed, needs '{backend.name}.<name>'"
            )
        if strategy.name in seen:
            raise BackendError(f"strategy {strategy.name!r} is declared twice, needs a name of its own for each")
        seen.add(strategy.name)
        if strategy.pattern not in patterns:
            known = ", ".join(sorted(patterns))
            raise BackendError(f"strategy {strategy.name!r} is for pattern {strategy.pattern!r}, needs one of {known}")
        strategy.check(patterns[strategy.pattern])


def _check_readings(backend: Backend, words: dict[str, Operation]) -> None:
    for dialect in backend.dialects:
        check_printable("the name of a dialect", dialect.name)
        check_dialect(dialect, words)


def check_dialect(dialect: Dialect, words: Mapping[str, Operation]) -> None:
    """Raise if a reading does not fit its operation: it would never match, without any message."""
    for operator, reading in dialect.readings.items():
        where = f"dialect {dialect.name!r}, reading of {operator!r}"
        given_words = reading.words if isinstance(reading, Refusal) else [r.word for r in dialect.words_of(operator)]
        if unknown := [name for name in given_words if name not in words]:
            raise BackendError(f"{where}: the word is {unknown[0]!r}, needs one of {', '.join(sorted(words))}")
        earlier: set[str] = set()
        for each in dialect.words_of(operator):
            word = words[each.word]
            given, needed = each.parameters, set(word.signature.parameters)
            if given != needed:
                lacks, extra = sorted(needed - given), sorted(given - needed)
                raise BackendError(f"{where} lacks {lacks} and has {extra} too many, needs {word.name}{word.signature}")
            if (names := tuple(each.results)) != word.results:
                raise BackendError(f"{where} gives {names}, needs {word.results}, the results of {word.name}")
            for operand in each.operands.values():
                if isinstance(operand, Earlier) and operand.result not in earlier:
                    found = f"{word.name} takes {operand.result!r} of an earlier word"
                    raise BackendError(f"{where}: {found}, needs one of {sorted(earlier)}")
            earlier.update(word.results)
