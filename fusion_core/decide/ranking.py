"""Which of the strategies that can and should run is the best."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_core.decision import Figure
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy

TIE = 0.02
"""Part of a time within which two measured ones are a tie: measuring anew may well turn them round."""

Usable = tuple[Strategy, Pattern, Figure | None]
"""A strategy that can and should run, its pattern, and what was measured of it."""


def best_first(registry: Registry, usable: Sequence[Usable]) -> list[int]:
    """The places of usable strategies, best first.

    Backends that the user put in an order come in that order. Then what was measured, the fastest first, where the
    longest pattern wins a tie: it leaves the fewest kernels. Then the longest pattern, backends by name with reference
    last, and the strategies' own rank and name.
    """
    ordered = registry.config.order is not None
    tiers = {name: tier for tier, names in enumerate(registry.tiers) for name in names}
    most: dict[int, float] = {}
    for strategy, _, found in usable:
        if found is not None and found.us is not None:
            tier = tiers[strategy.backend] if ordered else 0
            most[tier] = max(most.get(tier, 0.0), found.unfused_us - found.us)

    def key(place: int) -> tuple[object, ...]:
        strategy, pattern, found = usable[place]
        tier = tiers[strategy.backend]
        speed: tuple[object, ...] = (True, 0.0)
        if found is not None and found.us is not None:
            behind = most[tier if ordered else 0] - (found.unfused_us - found.us)
            speed = (False, 0.0 if behind <= TIE * found.us else behind)
        by_speed = (tier, *speed) if ordered else (*speed, tier)
        return *by_speed, -len(pattern.steps), strategy.backend, -strategy.rank, strategy.name

    return sorted(range(len(usable)), key=key)
