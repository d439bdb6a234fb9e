"""What is decided at one all_reduce, as values: stages hand them to the report."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_core.reason import TUNE, Reason, Stage


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of one strategy at one site.

    Attributes:
        pattern: The candidate pattern.
        strategy: The strategy's name; None where no backend has one for the pattern.
        stage: How far it got.
        reasons: Why no further; empty for the chosen one.
    """

    pattern: str
    strategy: str | None
    stage: Stage
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs at a site from one token count on.

    Attributes:
        first: The token count; that of the site where it is known when the graph is compiled.
        strategy: The strategy's name; None for torch's all_reduce with what follows it.
        figure: Its measured time there and the unfused one's; None where no table has them.
        asks: What each call asks before it runs. Where that is not met, the next choice from the same count on runs.
    """

    first: int
    strategy: str | None
    figure: Figure | None = None
    asks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A pattern that nearly stands at one all_reduce, and is longer than the one that does.

    Attributes:
        pattern: The pattern; of several that miss for one reason, the shortest.
        reason: What is missing.
    """

    pattern: str
    reason: Reason


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
