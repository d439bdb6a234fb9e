"""What runs at a site whose token count is known only at run time: a choice for every count, made at compile time.

A choice is made as for a site of that size. Requirements say at which counts their answers change (`Terms`), and those
counts are looked at. A requirement that cannot say it is asked at each call: the choice is then a list, of which the
first runs whose requirements the call meets. Which strategy is fastest is looked up at powers of two, and where that
changes is found by halving.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from fusion_core.config import DETERMINISTIC
from fusion_core.decide.candidate import Candidate, Standing, Verdict
from fusion_core.decide.eligibility import able, unprofitable
from fusion_core.decide.measured import figure
from fusion_core.decide.ranking import Usable, best_first
from fusion_core.decision import Choice, Decision, Figure
from fusion_core.dispatch.by_tokens import guarded
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.asking import Terms, said
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason, Stage
from fusion_core.site import Site
from fusion_core.site.run_time import to_data

BARE = "all_reduce"

SAMPLES = tuple(1 << power for power in range(22))
"""Token counts at which figures are looked at; between two that choose alike, no other choice is looked for."""


@dataclass(frozen=True, eq=False)
class Eligible:
    """A strategy that can run at some counts of a place, and what its requirements say by them."""

    strategy: Strategy
    standing: Standing
    requires: Terms
    worthwhile: Terms

    @classmethod
    def of(cls, strategy: Strategy, standing: Standing) -> Eligible:
        """Ask a strategy at a place."""
        assert isinstance(standing.site, Site)
        return cls(strategy, standing, *(Terms(e, standing.site) for e in (strategy.requires, strategy.worthwhile)))

    @property
    def pattern(self) -> Pattern:
        """The strategy's pattern."""
        return self.standing.pattern

    @property
    def defines(self) -> bool:
        """Whether it is its pattern's own definition."""
        return self.strategy.is_definition(self.pattern)

    def asks(self, registry: Registry, found: Figure | None) -> tuple[int, ...]:
        """What each call asks: places in the strategy's ``requires`` and, behind them, ``worthwhile``."""
        measured = found is not None or registry.config.numerics == DETERMINISTIC
        later = () if measured else self.worthwhile.each_call
        return *self.requires.each_call, *(len(self.strategy.requires) + place for place in later)


Alternatives = tuple[tuple[Eligible | None, Figure | None, tuple[int, ...]], ...]
"""What runs at a token count, in order of preference: the last one asks nothing of the call."""

Chosen = tuple[Choice, tuple[int, ...]]
"""A choice, and which requirements of its strategy each call asks."""


def judge_by_tokens(standings: Sequence[Standing], longest: Site, registry: Registry) -> Verdict:
    """Ask every strategy at every token count, and make one candidate of what is chosen.

    Args:
        standings: The patterns at one all_reduce, the longest first.
        longest: Where the longest of them stands.
        registry: What is installed and configured.
    """
    decisions: dict[str, Decision] = {}
    able_here: list[tuple[Strategy, Standing]] = []
    for each in standings:
        for strategy in registry.strategies(each.pattern.name):
            stage, reasons = able(strategy, each.pattern, each.site, registry)
            if stage is Stage.CHOSEN and (off := strategy.switched_off(registry.config)):
                stage, reasons = Stage.OPTION, off
            decisions[strategy.name] = Decision(each.pattern.name, strategy.name, stage, reasons)
            if stage is Stage.CHOSEN:
                able_here.append((strategy, each))
    # the sites of a model's layers are mostly alike
    form = repr([replace(each.site, node="") for each in standings if isinstance(each.site, Site)])
    if form not in registry.chosen_by_tokens:
        eligible = [Eligible.of(strategy, each) for strategy, each in able_here]
        registry.chosen_by_tokens[form] = _choose(eligible, longest, registry)
    pattern, chosen, refused = registry.chosen_by_tokens[form]
    for name, (stage, reasons) in refused.items():
        decisions[name] = replace(decisions[name], stage=stage, reasons=reasons)
    candidates = []
    if chosen:
        place = next(each for each in standings if each.pattern.name == pattern)
        candidates.append(_candidate(place, chosen, {strategy.name: strategy for strategy, _ in able_here}, registry))
    return Verdict(longest, candidates, list(decisions.values()))


def _choose(
    eligible: Sequence[Eligible], longest: Site, registry: Registry
) -> tuple[str, tuple[Chosen, ...], dict[str, tuple[Stage, tuple[Reason, ...]]]]:
    """The pattern to replace, what runs there, and why the others do not."""
    found: tuple[str, tuple[Chosen, ...]] = ("", ())
    for pattern in dict.fromkeys(each.pattern.name for each in eligible):
        # an operator runs a whole pattern, or the bare all_reduce with the rest of the pattern behind it
        here = [each for each in eligible if each.pattern.name in (pattern, BARE)]
        own = {each.strategy.name for each in here if each.pattern.name == pattern and not each.defines}
        chosen = choices(here, longest, registry) if own else ()
        if any(choice.strategy in own for choice, _ in chosen):
            found = pattern, chosen
            break
    else:  # at most definitions, which Inductor takes apart, whatever the size
        chosen = choices([each for each in eligible if each.defines], longest, registry)
        names = {choice.strategy for choice, _ in chosen}
        pattern = next((each.pattern.name for each in eligible if each.strategy.name in names), "")
        found = pattern, chosen
    said = {choice.strategy for choice, _ in found[1]}
    others = {
        each.strategy.name: _refusal(each, longest, registry) for each in eligible if each.strategy.name not in said
    }
    return *found, others


def choices(eligible: Sequence[Eligible], longest: Site, registry: Registry) -> tuple[Chosen, ...]:
    """What runs from which token count on; empty where nothing but torch's own path ever does."""

    @functools.cache
    def best(tokens: int) -> Alternatives:
        return _best(eligible, longest, registry, tokens)

    def name(tokens: int) -> tuple[Any, ...]:
        return tuple((None if each is None else each.strategy.name, asks) for each, _, asks in best(tokens))

    firsts = [1]
    if registry.config.numerics != DETERMINISTIC:
        for low, high in pairwise(_looked_at(eligible, registry)):
            while name(low) != name(high):
                low = _change(name, low, high)
                firsts.append(low)
    made = tuple(_chosen(first, *alternative) for first in firsts for alternative in best(first))
    return made if any(choice.strategy for choice, _ in made) else ()


def _chosen(first: int, each: Eligible | None, found: Figure | None, asks: tuple[int, ...]) -> Chosen:
    if each is None:
        return Choice(first, None), ()
    declared = (*each.strategy.requires, *each.strategy.worthwhile)
    return Choice(first, each.strategy.name, found, tuple(said(declared[place]) for place in asks)), asks


def _looked_at(eligible: Sequence[Eligible], registry: Registry) -> list[int]:
    """Token counts to look at: samples, and both sides of each at which a requirement's answer may change."""
    changes = {count for each in eligible for terms in (each.requires, each.worthwhile) for count in terms.changes}
    if registry.config.max_tokens is not None:
        changes.add(registry.config.max_tokens + 1)
    return sorted({1, *SAMPLES, *(side for count in changes for side in (count - 1, count) if side > 0)})


def _change(name: Callable[[int], tuple[Any, ...]], low: int, high: int) -> int:
    """The first token count at which another choice is made than at ``low``; at ``high`` one is."""
    before = name(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if name(middle) == before else (low, middle)
    return high


def _best(eligible: Sequence[Eligible], longest: Site, registry: Registry, tokens: int) -> Alternatives:
    usable: list[Usable] = []
    here: list[Eligible] = []
    for each in eligible:
        found = figure(registry, each.strategy, each.pattern, longest, tokens)
        if not _hindrance(each, registry, tokens, found)[1]:
            usable.append((each.strategy, each.pattern, found))
            here.append(each)
    preferred: list[tuple[Eligible | None, Figure | None, tuple[int, ...]]] = []
    for place in best_first(registry, usable):
        found = usable[place][2]
        preferred.append((here[place], found, here[place].asks(registry, found)))
        if not preferred[-1][2]:
            return tuple(preferred)
    return (*preferred, (None, None, ()))


def _hindrance(
    each: Eligible, registry: Registry, tokens: int, found: Figure | None
) -> tuple[Stage, tuple[Reason, ...]]:
    assert isinstance(each.standing.site, Site)
    site = each.standing.site.at(tokens)
    if reasons := each.requires.unmet(site):
        return Stage.REQUIRES, reasons
    declared = functools.partial(each.worthwhile.unmet, site)
    return Stage.WORTHWHILE, unprofitable(each.strategy, site, registry, found, declared)


def _refusal(each: Eligible, longest: Site, registry: Registry) -> tuple[Stage, tuple[Reason, ...]]:
    """Why a strategy that could run is chosen at no token count: by itself at the least one, or for another's sake."""
    nearest: tuple[Stage, tuple[Reason, ...]] | None = None
    for tokens in _looked_at([each], registry):
        found = figure(registry, each.strategy, each.pattern, longest, tokens)
        stage, reasons = _hindrance(each, registry, tokens, found)
        if not reasons:
            return Stage.OUTRANKED, (Reason("outranked", "at each token count at which it pays another comes first"),)
        nearest = nearest or (stage, reasons)
    assert nearest is not None
    return nearest


def _candidate(
    place: Standing, chosen: tuple[Chosen, ...], known: dict[str, Strategy], registry: Registry
) -> Candidate:
    assert place.match is not None
    assert isinstance(place.site, Site)
    made = tuple(choice for choice, _ in chosen)
    used = {name: known[name] for choice in made if (name := choice.strategy) is not None}
    if len(chosen) == 1:
        return Candidate(used[str(made[0].strategy)], place.match, place.site, made)
    paths = tuple(
        (each.first, None if each.strategy is None or _defines(used[each.strategy], registry) else each.strategy)
        for each in made
    )
    asks = tuple(asks for _, asks in chosen) if any(asks for _, asks in chosen) else ()
    form = to_data(place.site) if asks else None
    strategy = guarded(place.match, paths, used, registry.config, registry.patterns, asks, form)
    return Candidate(strategy, place.match, place.site, made)


def _defines(strategy: Strategy, registry: Registry) -> bool:
    return strategy.is_definition(registry.patterns[strategy.pattern])
