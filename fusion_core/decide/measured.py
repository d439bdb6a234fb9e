"""What a tuning table says of a strategy at a site."""

from __future__ import annotations

from fusion_core.decision import Figure
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy
from fusion_core.site import Site
from fusion_core.tables.table import UNFUSED


def figure(registry: Registry, strategy: Strategy, pattern: Pattern, longest: Site, tokens: int) -> Figure | None:
    """What the table in use says; None where it says nothing, of a backend that was not there when it was made.

    Args:
        registry: With the table.
        strategy: The strategy.
        pattern: Its pattern.
        longest: The site of the longest pattern that stands at the place. Where that was not measured, the strategy's
            own pattern is asked: what follows it is the same with it and without it.
        tokens: Rows of x.
    """
    table = registry.table(longest.device, longest.world_size)
    x = longest.inputs["x"]
    if table is None or not x.shape or not isinstance(x.shape[-1], int):
        return None
    for name in dict.fromkeys((longest.pattern, pattern.name)):
        found = table.figures(name, x.dtype, x.shape[-1], tokens)
        if strategy.name in found:
            return Figure(found[strategy.name], found[UNFUSED], tokens)
        if found and strategy.backend in table.backends and not strategy.is_definition(pattern):
            return Figure(None, found[UNFUSED], tokens)
        if found:
            return None
    return None
