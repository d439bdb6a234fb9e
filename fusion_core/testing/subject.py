"""The strategy under test, identified by names, so that workers can load it too."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

from fusion_core.config import FusionConfig
from fusion_core.errors import BackendError
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import GROUP, Registry
from fusion_core.plugins.requirements import Requirement
from fusion_core.plugins.strategy import Strategy


@dataclass(frozen=True)
class Subject:
    """One strategy of one backend.

    Attributes:
        backend: The backend's name.
        name: The strategy's name, ``"<backend>.<something>"``.
        entry_point: The value of its entry point (``"package.module:object"``), for a backend that is not installed;
            None for an installed one.
        examples: The number of generated examples per check; None for that of hypothesis's profile.
    """

    backend: str
    name: str
    entry_point: str | None = None
    examples: int | None = None

    @property
    def registry(self) -> Registry:
        """A registry with only this backend."""
        return load(self.backend, self.entry_point)

    @property
    def strategy(self) -> Strategy:
        """The declaration."""
        return next(each for each in self.registry.backends[self.backend].strategies if each.name == self.name)

    @property
    def pattern(self) -> Pattern:
        """The pattern that it runs."""
        return self.registry.patterns[self.strategy.pattern]

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """All conditions for its correctness, declared and implied."""
        return (*self.strategy.implied(self.pattern), *self.strategy.requires)

    def alone(self) -> Registry:
        """A registry with only this strategy, without its ``worthwhile`` conditions and its option."""
        backend = self.registry.backends[self.backend]
        only = replace(backend, strategies=(replace(self.strategy, worthwhile=(), option=None),))
        return replace(self.registry, backends={self.backend: only})

    def __str__(self) -> str:
        return self.name


@functools.cache
def load(backend: str, entry_point: str | None = None) -> Registry:
    """A registry with one backend; imports the module ``testing`` of its package if there is one.

    Raises:
        BackendError: if the backend is not installed or does not load, or its module ``testing`` does not load.
    """
    # For the kit, FUSION_CORE_STRICT concerns skips, not other plugins that may be broken here. FUSION_CORE_OPTIONS may
    # name options of other backends. A table concerns speed, which the kit does not check.
    config = FusionConfig(order=(backend,), strict=False, options=(), table="none", numerics="default")
    if entry_point is None:
        registry = Registry.load(config)
    else:
        registry = Registry.of([EntryPoint(backend, entry_point, GROUP)], config)
    if backend in registry.backends:
        _import_testing(backend, registry.backends[backend].plugin)
    return registry


def _import_testing(backend: str, plugin: Any) -> None:
    """Import the plugin's ``<package>.testing``, where it registers the sides of its own requirements."""
    module = plugin if isinstance(plugin, ModuleType) else sys.modules.get(type(plugin).__module__)
    package = getattr(module, "__package__", None)
    if not package or package.partition(".")[0] == "fusion_core":
        return
    name = f"{package}.testing"
    try:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    except Exception as error:
        raise BackendError(f"importing {name} of backend {backend!r} raised {type(error).__name__}: {error}") from error


def subjects(backend: str, entry_point: str | None = None, examples: int | None = None) -> tuple[Subject, ...]:
    """Every strategy of a backend, except those with an option that ``FUSION_CORE_OPTIONS`` does not switch on.

    A strategy with an option may do things that are not safe on every machine.

    Raises:
        BackendError: if the backend is not installed or does not load, with the reason.
    """
    config = FusionConfig()
    strategies = [s for s in load(backend, entry_point).backends[backend].strategies if not s.switched_off(config)]
    return tuple(Subject(backend, strategy.name, entry_point, examples) for strategy in strategies)
