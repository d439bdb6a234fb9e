"""What matching and judging hand on: patterns at one all_reduce, and the strategies that may run there."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_core.decision import Choice, Decision, NearMiss
from fusion_core.match.matcher import Match
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.site import Site


@dataclass(frozen=True, eq=False, slots=True)
class Standing:
    """A pattern at one all_reduce: where it stands, or why not, and how many of its steps do."""

    pattern: Pattern
    match: Match | None
    site: Site | Reason
    depth: int


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """A strategy that can and should run at a site, and the match that it would replace.

    ``choices`` say why, by token counts: one for a site of a fixed size that was measured.
    """

    strategy: Strategy
    match: Match
    site: Site
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, eq=False)
class Verdict:
    """All that was found at one all_reduce.

    Attributes:
        site: The longest pattern that stands there; None where not even the bare all_reduce does.
        candidates: Usable strategies, best first.
        decisions: One for every strategy of every pattern, longest pattern first.
        near_misses: What nearly makes a longer pattern of it.
    """

    site: Site | None
    candidates: list[Candidate]
    decisions: list[Decision]
    near_misses: tuple[NearMiss, ...] = ()
