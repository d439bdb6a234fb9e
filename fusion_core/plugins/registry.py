"""Everything that plugins provide: backends, strategies, patterns, dialects, and what failed to load."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fusion_core.config import FusionConfig, check_environment
from fusion_core.errors import BackendError, ConfigError, described
from fusion_core.fallback import Status
from fusion_core.lift.dialect import Dialect
from fusion_core.lift.dialects import CORE_DIALECTS
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.loader import Backend, LoadFailure, load_all
from fusion_core.plugins.once import warn_once
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.site import Device
from fusion_core.tables.store import Found, find
from fusion_core.tables.table import Table

GROUP = "fusion_core.backends"
LAST = ("reference",)
"""Backends that come after all others unless the user orders otherwise: they are always usable and never faster."""


@dataclass(eq=False)  # compared by identity: it is the key of caches
class Registry:
    """Backends in the order in which they are tried, and those that failed to load.

    Attributes:
        config: The user's configuration.
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
    _tables: dict[tuple[Device, int], Found] = field(default_factory=dict)
    _refused: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)
    _tableless: Reason | None = None

    @classmethod
    def load(cls, config: FusionConfig | None = None) -> Registry:
        """Load every backend that an entry point of the group ``fusion_core.backends`` names.

        Imports the plugins, and none of the kernel libraries behind them.

        Raises:
            BackendError: if a backend named in ``config.order`` is unknown or fails to load, if no backend has an
                option named in ``config.options``, and under ``config.strict`` if any backend fails to load.
            ConfigError: if the environment contains a value or a name that cannot be used.
        """
        check_environment()
        return cls.of(entry_points(group=GROUP), FusionConfig() if config is None else config)

    @classmethod
    def of(cls, points: Iterable[EntryPoint], config: FusionConfig) -> Registry:
        """The registry of these entry points; `load` with the installed ones."""
        loaded, failures = load_all(sorted(points, key=lambda point: (point.name, point.value)))
        if config.strict and failures:
            raise BackendError("; ".join(map(str, failures)))
        for failure in failures:
            if config.order is None or failure.backend in config.order:
                warn_once(str(failure), 3)
        tiers = _tiers(config, loaded, failures)
        _check_options(config, loaded, failures)
        names = [name for tier in tiers for name in tier]
        patterns = {pattern.name: pattern for pattern in CORE_PATTERNS}
        patterns |= {pattern.name: pattern for name in sorted(loaded) for pattern in loaded[name].patterns}
        return cls(config, {name: loaded[name] for name in names}, tuple(failures), patterns, tiers)

    def strategies(self, pattern: str) -> tuple[Strategy, ...]:
        """Every strategy for a pattern, each variant by itself, in the order in which backends are tried."""
        return self._strategies.get(pattern, ())

    @functools.cached_property
    def _strategies(self) -> dict[str, tuple[Strategy, ...]]:
        every = [strategy for backend in self.backends.values() for strategy in backend.strategies]
        names = dict.fromkeys(strategy.pattern for strategy in every)
        return {name: tuple(each for each in every if each.pattern == name) for name in names}

    @functools.cached_property
    def dialects(self) -> tuple[Dialect, ...]:
        """The library's own dialects, then every dialect of every backend in use."""
        return (*CORE_DIALECTS, *(dialect for backend in self.backends.values() for dialect in backend.dialects))

    def unavailable(self, backend: str, device: Device) -> tuple[Reason, ...]:
        """The reasons why a backend cannot be used on a device; empty if it can. Asked once per device."""
        key = (backend, device)
        if key not in self._available:
            try:
                hooks = self.backends[backend].hooks
                reasons = tuple(hooks.items("fusion_available", Reason, or_none=True, device=device))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001  # it makes only its own backend unavailable
                reasons = (Reason("probe", f"fusion_available of {backend!r} raised {described(error)}"),)
            self._available[key] = reasons
        return self._available[key] or self._refused.get(backend, ())

    def without(self, backends: Mapping[str, tuple[Reason, ...]], table: Reason | None) -> Registry:
        """A copy for ranks that differ: without some backends on any device, and without tables if there is a reason.

        Args:
            backends: Names of backends that cannot be used → why.
            table: Why no table is used; None if tables may be used.
        """
        return replace(self, _tables={}, _refused=backends, _tableless=table)

    def table(self, device: Device, world_size: int) -> Table | None:
        """The tuning table of this machine for this number of ranks; None if there is none, or the user wants none.

        Raises:
            ConfigError: under ``config.strict``, if there is a table that cannot be used.
        """
        return self.found_table(device, world_size).table

    def found_table(self, device: Device, world_size: int) -> Found:
        """The same table with its origin, or why it cannot be used. Searched for once."""
        if self._tableless is not None:
            return Found(None, problems=(self._tableless,))
        key = (device, world_size)
        if key not in self._tables:
            found = find(device, world_size, self.config.table)
            for problem in found.problems:
                if self.config.strict:
                    raise ConfigError(str(problem))
                warn_once(str(problem))
            self._tables[key] = found
        return self._tables[key]

    def status(self, backend: str, device: Device) -> tuple[Status, ...]:
        """The state that a backend keeps in this process.

        Raises:
            BackendError: if its hook raises, or returns anything but `Status` objects.
        """
        try:
            hooks = self.backends[backend].hooks
            return tuple(hooks.items("fusion_status", Status, or_none=True, device=device))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise BackendError(f"fusion_status of {backend!r} raised {described(error)}") from error

    def notify(self, report: Any) -> None:
        """Pass a report to every plugin that implements ``fusion_report``; one that raises is named in a warning."""
        for backend in self.backends.values():
            try:
                backend.hooks.call("fusion_report", report=report)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                found = f"fusion_report of backend {backend.name!r} raised {described(error)}"
                if self.config.strict:
                    raise BackendError(found) from error
                warn_once(found)


def _check_options(config: FusionConfig, loaded: dict[str, Backend], failures: list[LoadFailure]) -> None:
    """Raise if no strategy has an option: a misspelt one would have no effect."""
    known = {strategy.switch for backend in loaded.values() for strategy in backend.strategies} - {None}
    failed = {failure.backend for failure in failures} - loaded.keys()  # already reported; their options are unknown
    for option in config.options:
        if option not in known and option.partition(".")[0] not in failed:
            listed = ", ".join(sorted(filter(None, known))) or "none"
            raise BackendError(
                f"options names {option!r}, which no strategy of a backend that loads has; the options are: {listed}"
            )


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
