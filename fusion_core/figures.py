"""What a tuning table says of a strategy at a site."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_core.known_faster import TUNE
from fusion_core.patterns.definition import Pattern
from fusion_core.reason import Reason
from fusion_core.registry import Registry
from fusion_core.site import Site
from fusion_core.strategy import Strategy
from fusion_core.tuning.table import UNFUSED


@dataclass(frozen=True, slots=True)
class Figure:
    """Measured times of one place, or what lies between measured ones.

    Attributes:
        us: Microseconds with the strategy; None where its backend was measured and it was not.
        unfused_us: Microseconds of the best that is there without it.
        tokens: At how many tokens.
    """

    us: float | None
    unfused_us: float
    tokens: int

    def slower(self) -> Reason | None:
        """Why the strategy does not pay; None where it does."""
        if self.us is None:
            found = f"the table has no figure for it at {_tokens(self.tokens)}"
            return Reason("measured", found, "one", hint=TUNE)
        if self.us < self.unfused_us:
            return None
        found = f"{self.us:.1f} us, where the unfused path takes {self.unfused_us:.1f} us, at {_tokens(self.tokens)}"
        return Reason("measured", found, "less")

    def __str__(self) -> str:
        return f"fused {self.us or 0.0:.1f} us, unfused {self.unfused_us:.1f} us at {_tokens(self.tokens)}"


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


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
        if found and strategy.backend in table.backends and not is_definition(strategy, pattern):
            return Figure(None, found[UNFUSED], tokens)
        if found:
            return None
    return None


def is_definition(strategy: Strategy, pattern: Pattern) -> bool:
    """Whether a strategy is its pattern's own definition: the unfused path by another name."""
    return strategy.impl is pattern.function
