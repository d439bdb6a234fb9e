"""The timing of a strategy at a site, from a tuning table."""

from __future__ import annotations

from collections.abc import Mapping

from fusion_core.decision import Timing
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy
from fusion_core.site import Site
from fusion_core.tables.schema import UNFUSED, base_line


def timing(registry: Registry, strategy: Strategy, pattern: Pattern, longest: Site, tokens: int) -> Timing | None:
    """The timing in the table in use; None if it has none, e.g. for a backend that was missing when it was made.

    Args:
        registry: Provides the table.
        strategy: The strategy.
        pattern: Its pattern.
        longest: The site of the longest pattern that matches. If that pattern was not measured, the strategy's own one
            is looked up: what follows it takes the same time with the strategy and without.
        tokens: Rows of x.
    """
    table = registry.table(longest.device, longest.world_size)
    x = longest.inputs["x"]
    if table is None or not x.shape or not isinstance(x.shape[-1], int):
        return None
    for name in dict.fromkeys((longest.pattern, pattern.name)):
        found = table.times(name, x.dtype, x.shape[-1], tokens)
        if strategy.name in found:
            return Timing(found[strategy.name], *_unfused(longest, found, tokens))
        if found and strategy.backend in table.backends and not strategy.is_definition(pattern):
            return Timing(None, *_unfused(longest, found, tokens))
        if found:
            return None
    return None


def _unfused(site: Site, found: Mapping[str, float], tokens: int) -> tuple[float, int, str | None]:
    """The time of the unfused path, over the all_reduce that the model calls if that was measured."""
    own = site.attributes.get("collective")
    if own is None or str(own).startswith("_c10d_functional::"):
        return found[UNFUSED], tokens, None
    if (column := base_line(own)) in found:
        return found[column], tokens, own
    return found[UNFUSED], tokens, "torch's all_reduce"
