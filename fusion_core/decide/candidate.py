"""The results of matching and judging at one all_reduce: patterns, and the strategies that may run there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from fusion_core.decision import Choice, Decision, NearMiss
from fusion_core.match.matcher import Match
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.asking import Answers
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.site import Site


@dataclass(frozen=True, eq=False)
class PatternOutcome:
    """A pattern at one all_reduce: its site, or why it does not match, and how many of its steps match."""

    pattern: Pattern
    match: Match | None
    site: Site | Reason
    depth: int

    @functools.cached_property
    def answers(self) -> Answers | Reason:
        """The answers of requirements at the site, shared by all strategies; or the reason why there is no site."""
        return Answers(self.site) if isinstance(self.site, Site) else self.site

    @functools.cached_property
    def by_tokens(self) -> Callable[[int], Answers]:
        """The answers of requirements at the site, by its number of tokens."""
        assert isinstance(self.site, Site)
        site = self.site
        return functools.cache(lambda tokens: Answers(site.at(tokens)))


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """A strategy that can and should run at a site, and the match that it would replace.

    ``choices`` record why, by token count. A site of fixed size has one if it was measured.
    """

    strategy: Strategy
    match: Match
    site: Site
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, eq=False)
class SiteVerdict:
    """The verdict at one all_reduce.

    Attributes:
        site: The site of the longest pattern that matches; None if not even the bare all_reduce does.
        candidates: Usable strategies, best first.
        decisions: One for every strategy of every pattern, longest pattern first.
        near_misses: Why longer patterns that nearly match do not.
        word: The word of the collective, which names the site if no pattern matches.
    """

    site: Site | None
    candidates: list[Candidate]
    decisions: list[Decision]
    near_misses: tuple[NearMiss, ...] = ()
    word: str = "all_reduce"
