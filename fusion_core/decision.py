"""The decisions at one all_reduce, as values that the report contains."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_core.reason import TUNE, Reason, Stage


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome for one strategy at one site.

    Attributes:
        pattern: The candidate pattern.
        strategy: The strategy's name; None if no backend has one for the pattern.
        stage: How far it got.
        reasons: Why it got no further; empty for the chosen one.
    """

    pattern: str
    strategy: str | None
    stage: Stage
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs at a site from a given token count upwards.

    Attributes:
        first: The token count; the site's own if it is known when the graph is compiled.
        strategy: The strategy's name; None for torch's all_reduce and the unfused code that follows it.
        timing: Its measured time there and that of the unfused path; None if no table has them.
        asks: Conditions that are checked at each call. If one is not met, the next choice with the same ``first`` runs.
    """

    first: int
    strategy: str | None
    timing: Timing | None = None
    asks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A pattern that almost matches at one all_reduce, and is longer than the one that does match.

    Attributes:
        pattern: The pattern; if several miss for the same reason, the shortest.
        reason: What is missing.
    """

    pattern: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Timing:
    """Times at one site, measured or interpolated between measured points.

    Attributes:
        us: Microseconds with the strategy; None if the table has times of its backend but not of this strategy.
        unfused_us: Microseconds of the fastest path without it.
        tokens: The token count.
        base_line: What reduces in the fastest path without it, where the model does not call torch's all_reduce: the
            model's own operator, or ``"torch's all_reduce"`` if the table has no time of that.
    """

    us: float | None
    unfused_us: float
    tokens: int
    base_line: str | None = None

    def slower(self) -> Reason | None:
        """The reason why the strategy does not pay, or None if it does."""
        if self.us is None:
            found = f"the table has no figure for it at {_tokens(self.tokens)}"
            return Reason("measured", found, "one", hint=TUNE)
        if self.us < self.unfused_us:
            return None
        path = f"the unfused path{self._by} takes {self.unfused_us:.1f} us"
        found = f"{self.us:.1f} us, where {path}, at {_tokens(self.tokens)}"
        return Reason("measured", found, "less")

    def __str__(self) -> str:
        return f"fused {self.us or 0.0:.1f} us, unfused{self._by} {self.unfused_us:.1f} us at {_tokens(self.tokens)}"

    @property
    def _by(self) -> str:
        return "" if self.base_line is None else f" by {self.base_line}"


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"
