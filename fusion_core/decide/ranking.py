"""The order of the strategies that can and should run, best first."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_core.decision import Timing
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy

TIE = 0.02
"""Fraction of a time within which two timings are a tie: a new measurement may well reverse them."""

Usable = tuple[Strategy, Pattern, Timing | None]
"""A strategy that can and should run, its pattern, and its timing if it was measured."""


def rank_indices(registry: Registry, usable: Sequence[Usable]) -> list[int]:
    """The indices of usable strategies, best first.

    The user's order of backends, if there is one, decides first. Measured strategies come next, the fastest first; the
    longest pattern wins a tie, since it leaves the fewest kernels. The rest are ordered by the longest pattern, by
    backend name with reference last, and by the strategies' own rank and name.
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
