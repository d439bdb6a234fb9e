"""Everything that plugins bring: backends, strategies, patterns, dialects, and what failed to load."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from fusion_core import hookspecs
from fusion_core.config import FusionConfig, check_environment
from fusion_core.errors import BackendError, FusionError
from fusion_core.lifting.dialect import Dialect
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import Pattern
from fusion_core.reason import Reason
from fusion_core.site import Device
from fusion_core.strategy import Strategy
from fusion_core.vocabulary import Operation

GROUP = "fusion_core.backends"
LAST = ("reference",)
"""Backends that come after all others unless the user orders otherwise: they are always usable and gain nothing."""


@dataclass(frozen=True)
class Backend:
    """One loaded plugin and what it declared."""

    name: str
    plugin: ModuleType | Any
    strategies: tuple[Strategy, ...] = ()
    patterns: tuple[Pattern, ...] = ()
    dialects: tuple[Dialect, ...] = ()
    distribution: str = ""
    """``name version`` of the distribution that its entry point came from."""


@dataclass(frozen=True)
class LoadFailure:
    """A plugin that is not used, and why."""

    backend: str
    reason: Reason

    def __str__(self) -> str:
        return f"backend {self.backend!r} not loaded: {self.reason}"


@dataclass
class Registry:
    """Backends in the order in which they are tried, and those that failed to load.

    Attributes:
        config: What the user chose.
        backends: The usable ones by name, best first.
        failures: Those that are not used, by name.
        patterns: Every pattern by name, core's and plugins'.
        tiers: Names of backends, grouped: one of an earlier group always comes before one of a later group.
    """

    config: FusionConfig
    backends: dict[str, Backend] = field(default_factory=dict)
    failures: tuple[LoadFailure, ...] = ()
    patterns: dict[str, Pattern] = field(default_factory=dict)
    tiers: tuple[tuple[str, ...], ...] = ()
    _available: dict[tuple[str, Device], tuple[Reason, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, config: FusionConfig | None = None) -> Registry:
        """Load every backend that an entry point of the group ``fusion_core.backends`` names.

        Imports the plugins, and none of the kernel libraries behind them.

        Raises:
            BackendError: where a backend named in ``config.order`` is unknown or fails to load, and under
                ``config.strict`` where any does.
            ConfigError: where the environment holds a value or a name that cannot be used.
        """
        check_environment()
        return cls.of(entry_points(group=GROUP), FusionConfig() if config is None else config)

    @classmethod
    def of(cls, points: Iterable[EntryPoint], config: FusionConfig) -> Registry:
        """The registry of these entry points; `load` with the installed ones."""
        loaded, failures = _load_all(sorted(points, key=lambda point: (point.name, point.value)))
        if config.strict and failures:
            raise BackendError("; ".join(map(str, failures)))
        for failure in failures:
            if config.order is None or failure.backend in config.order:
                warnings.warn(f"fusion_core: {failure}", RuntimeWarning, stacklevel=3)
        tiers = _tiers(config, loaded, failures)
        names = [name for tier in tiers for name in tier]
        patterns = {pattern.name: pattern for pattern in CORE_PATTERNS}
        patterns |= {pattern.name: pattern for name in sorted(loaded) for pattern in loaded[name].patterns}
        return cls(config, {name: loaded[name] for name in names}, tuple(failures), patterns, tiers)

    def strategies(self, pattern: str) -> tuple[Strategy, ...]:
        """Every strategy for a pattern, in the order in which backends are tried."""
        return tuple(s for backend in self.backends.values() for s in backend.strategies if s.pattern == pattern)

    @functools.cached_property
    def dialects(self) -> tuple[Dialect, ...]:
        """Every dialect of every backend in use."""
        return tuple(dialect for backend in self.backends.values() for dialect in backend.dialects)

    def unavailable(self, backend: str, device: Device) -> tuple[Reason, ...]:
        """Why a backend cannot be used on a device; empty where it can. Asked once per device."""
        key = (backend, device)
        if key not in self._available:
            try:
                reasons = tuple(_call(self.backends[backend].plugin, "fusion_available", device=device))
            except Exception as error:  # noqa: BLE001  # a probe that raises makes its own backend unavailable, and no other
                reasons = (Reason("probe", f"fusion_available of {backend!r} raised {type(error).__name__}: {error}"),)
            self._available[key] = reasons
        return self._available[key]

    def notify(self, report: Any) -> None:
        """Hand a report to every plugin that asked for it; one that raises is named in a warning."""
        for backend in self.backends.values():
            try:
                _call(backend.plugin, "fusion_report", report=report)
            except Exception as error:
                if self.config.strict:
                    raise BackendError(f"fusion_report of backend {backend.name!r} raised {error!r}") from error
                warnings.warn(
                    f"fusion_core: fusion_report of backend {backend.name!r} raised {error!r}",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _call(plugin: Any, hook: str, **arguments: Any) -> Iterator[Any] | tuple[Any, ...]:
    """One plugin's answer to one hook: asked alone, so that an error has an owner."""
    implementation = getattr(plugin, hook, None)
    if implementation is None or not hasattr(implementation, "fusion_core_impl"):
        return ()
    accepted = inspect.signature(implementation).parameters
    answer = implementation(**{name: value for name, value in arguments.items() if name in accepted})
    return () if answer is None else tuple(answer)


def _load_all(points: list[EntryPoint]) -> tuple[dict[str, Backend], list[LoadFailure]]:
    loaded: dict[str, Backend] = {}
    failures: list[LoadFailure] = []
    taken: dict[str, str] = {pattern.name: "fusion_core" for pattern in CORE_PATTERNS}
    by_name: dict[str, list[EntryPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # noqa: BLE001  # the loader: one broken plugin must never hide the others
            loaded.pop(name, None)
            failures.append(LoadFailure(name, _failure(error)))

    for name, candidates in by_name.items():
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
    """Core's patterns and those of the backends that are still in."""
    return {p.name: p for p in CORE_PATTERNS} | {p.name: p for b in loaded.values() for p in b.patterns}


def _failure(error: Exception) -> Reason:
    if isinstance(error, FusionError):
        return Reason("declaration", str(error))
    if isinstance(error, pluggy.PluginValidationError):
        return Reason("hook", " ".join(str(error).split()))
    if isinstance(error, ImportError):
        return Reason("import", f"{type(error).__name__}: {error}")
    return Reason("error", f"{type(error).__name__}: {error}")


def _load(name: str, candidates: list[EntryPoint]) -> Backend:
    if len({point.value for point in candidates}) > 1:
        owners = ", ".join(f"{point.value} ({_distribution(point) or 'unknown distribution'})" for point in candidates)
        raise BackendError(
            f"the name is taken by {len(candidates)} entry points, {owners}; needs a name of its own for each"
        )
    point = candidates[0]
    plugin = point.load()
    manager = pluggy.PluginManager("fusion_core")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name)
    manager.check_pending()  # a misspelt hook would otherwise be silent
    return Backend(
        name,
        plugin,
        tuple(_typed(plugin, "fusion_strategies", Strategy)),
        tuple(_typed(plugin, "fusion_patterns", Pattern)),
        tuple(_typed(plugin, "fusion_dialects", Dialect)),
        _distribution(point),
    )


def _typed(plugin: Any, hook: str, kind: type) -> Iterator[Any]:
    for item in _call(plugin, hook):
        if not isinstance(item, kind):
            raise BackendError(f"{hook} gave {item!r}, needs {kind.__name__} objects")
        yield item


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else ""


def _check_patterns(backend: Backend, taken: dict[str, str]) -> None:
    own: dict[str, str] = {}
    for pattern in backend.patterns:
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
    """Raise where a reading does not fit its word: it would never be matched, and nothing would say why."""
    for dialect in backend.dialects:
        for operator, reading in dialect.readings.items():
            where = f"dialect {dialect.name!r}, reading of {operator!r}"
            if reading.word not in words:
                raise BackendError(f"{where}: the word is {reading.word!r}, needs one of {', '.join(sorted(words))}")
            word = words[reading.word]
            given, needed = {*reading.operands, *reading.constants}, set(word.signature.parameters)
            if given != needed:
                lacks, extra = sorted(needed - given), sorted(given - needed)
                raise BackendError(f"{where} lacks {lacks} and has {extra} too many, needs {word.name}{word.signature}")
            if reading.results != word.results:
                raise BackendError(f"{where} gives {reading.results}, needs {word.results}, the results of {word.name}")


def _tiers(
    config: FusionConfig, loaded: dict[str, Backend], failures: list[LoadFailure]
) -> tuple[tuple[str, ...], ...]:
    if config.order is None:
        first = tuple(name for name in sorted(loaded) if name not in LAST)
        return tuple(tier for tier in (first, *((name,) for name in LAST if name in loaded)) if tier)
    for name in config.order:
        if name not in loaded:
            because = "; ".join(str(failure.reason) for failure in failures if failure.backend == name)
            known = ", ".join(sorted(loaded)) or "none"
            found = f"order names backend {name!r}, which " + (
                f"does not load: {because}" if because else "is not installed"
            )
            raise BackendError(f"{found}; the backends that load are: {known}")
    return tuple((name,) for name in config.order)
