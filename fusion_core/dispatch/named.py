"""The strategies and patterns that compiled graphs of this process name."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from fusion_core.config import FusionConfig
from fusion_core.errors import BackendError
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import Pattern
from fusion_core.patterns.means import MEANS
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy

_strategies: dict[str, Strategy] = {}
_patterns: dict[str, Pattern] = {pattern.name: pattern for pattern in (*CORE_PATTERNS, *MEANS.values())}


def know(strategies: Iterable[Strategy], pattern: Pattern) -> bool:
    """Name these from now on; whether another strategy had one of the names, of an earlier registry."""
    given = {strategy.name: strategy for strategy in strategies}
    another = any(_strategies.get(name, strategy) is not strategy for name, strategy in given.items())
    _strategies.update(given)
    _patterns[pattern.name] = pattern
    return another


def strategy_of(name: str) -> Strategy:
    """The strategy of a name: one that a plan of this process uses, else an installed backend's.

    Raises:
        BackendError: if there is none.
    """
    if name not in _strategies:
        registry = _installed()
        _strategies.update({s.name: s for each in registry.patterns for s in registry.strategies(each)})
    if name not in _strategies:
        raise BackendError(
            f"a compiled graph runs {name}, which no installed backend has; compile it anew with "
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
        )
    return _strategies[name]


def pattern_of(name: str) -> Pattern:
    """The pattern of a name: core's, one of a plan of this process, or an installed backend's.

    Raises:
        BackendError: if there is none.
    """
    if name not in _patterns:
        _patterns.update(_installed().patterns)
    if name not in _patterns:
        raise BackendError(f"a compiled graph has a place of pattern {name!r}, which no installed backend has")
    return _patterns[name]


@functools.cache
def _installed() -> Registry:
    return Registry.load(FusionConfig(order=None, strict=False, options=()))
