"""What runs at a site whose token count is known only at run time: a choice for every count, made at compile time.

A choice is made as for a site of that size, and where it changes is found by halving. Only strategies that are right
for any count take part; which of them is fastest, or known to be, is all that hangs on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from fusion_core.config import DETERMINISTIC
from fusion_core.decide import (
    Candidate,
    Choice,
    Decision,
    Usable,
    Verdict,
    able,
    best_first,
    unprofitable,
)
from fusion_core.figures import Figure, figure, is_definition
from fusion_core.nearest import Standing
from fusion_core.reason import Reason, Stage
from fusion_core.registry import Registry
from fusion_core.site import Site
from fusion_core.strategy import Strategy

BARE = "all_reduce"

SAMPLES = tuple(1 << power for power in range(22))
"""Token counts that are looked at; between two that choose alike, no other choice is looked for."""

Eligible = tuple[Strategy, Standing]


def judge_by_tokens(standings: Sequence[Standing], longest: Site, registry: Registry) -> Verdict:
    """Ask every strategy at every token count, and make one candidate of what is chosen.

    Args:
        standings: The patterns at one all_reduce, the longest first.
        longest: Where the longest of them stands.
        registry: What is installed and configured.
    """
    decisions: dict[str, Decision] = {}
    eligible: list[Eligible] = []
    for each in standings:
        for strategy in registry.strategies(each.pattern.name):
            stage, reasons = able(strategy, each.pattern, each.site, registry)
            if stage is Stage.CHOSEN and (off := strategy.switched_off(registry.config)):
                stage, reasons = Stage.OPTION, off
            decisions[strategy.name] = Decision(each.pattern.name, strategy.name, stage, reasons)
            if stage is Stage.CHOSEN:
                eligible.append((strategy, each))
    # the sites of a model's layers are mostly alike
    form = repr([replace(each.site, node="") for each in standings if isinstance(each.site, Site)])
    if form not in registry.chosen_by_tokens:
        registry.chosen_by_tokens[form] = _choose(eligible, longest, registry)
    pattern, chosen, refused = registry.chosen_by_tokens[form]
    for name, (stage, reasons) in refused.items():
        decisions[name] = replace(decisions[name], stage=stage, reasons=reasons)
    candidates = []
    if chosen:
        place = next(each for each in standings if each.pattern.name == pattern)
        candidates.append(_candidate(place, chosen, {strategy.name: strategy for strategy, _ in eligible}, registry))
    return Verdict(longest, candidates, list(decisions.values()))


def _choose(
    eligible: Sequence[Eligible], longest: Site, registry: Registry
) -> tuple[str, tuple[Choice, ...], dict[str, tuple[Stage, tuple[Reason, ...]]]]:
    """The pattern to replace, what runs there, and why the others do not."""
    patterns = dict.fromkeys(each.pattern.name for _, each in eligible)
    found: tuple[str, tuple[Choice, ...]] = ("", ())
    for pattern in patterns:
        # an operator runs a whole pattern, or the bare all_reduce with the rest of the pattern behind it
        here = [(strategy, each) for strategy, each in eligible if each.pattern.name in (pattern, BARE)]
        own = {s.name for s, each in here if each.pattern.name == pattern and not is_definition(s, each.pattern)}
        chosen = choices(here, longest, registry) if own else ()
        if any(choice.strategy in own for choice in chosen):
            found = pattern, chosen
            break
    else:  # at most definitions, which Inductor takes apart, whatever the size
        chosen = choices([each for each in eligible if is_definition(each[0], each[1].pattern)], longest, registry)
        names = {choice.strategy for choice in chosen}
        pattern = next((each.pattern.name for s, each in eligible if s.name in names), "")
        found = pattern, chosen
    said = {choice.strategy for choice in found[1]}
    others = {
        strategy.name: _refusal(strategy, each, longest, registry)
        for strategy, each in eligible
        if strategy.name not in said
    }
    return *found, others


def choices(eligible: Sequence[Eligible], longest: Site, registry: Registry) -> tuple[Choice, ...]:
    """What runs from which token count on; empty where nothing but torch's own path ever does."""

    @functools.cache
    def best(tokens: int) -> tuple[Strategy, Figure | None] | None:
        return _best(eligible, longest, registry, tokens)

    def name(tokens: int) -> str | None:
        found = best(tokens)
        return None if found is None else found[0].name

    firsts = [1]
    if registry.config.numerics != DETERMINISTIC:
        for low, high in pairwise(SAMPLES):
            while name(low) != name(high):
                low = _change(name, low, high)
                firsts.append(low)
    found = [(first, best(first)) for first in firsts]
    made = tuple(
        Choice(first, None) if chosen is None else Choice(first, chosen[0].name, chosen[1]) for first, chosen in found
    )
    return made if any(choice.strategy for choice in made) else ()


def _change(name: Callable[[int], str | None], low: int, high: int) -> int:
    """The first token count at which another choice is made than at ``low``; at ``high`` one is."""
    before = name(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if name(middle) == before else (low, middle)
    return high


def _best(
    eligible: Sequence[Eligible], longest: Site, registry: Registry, tokens: int
) -> tuple[Strategy, Figure | None] | None:
    usable: list[Usable] = []
    for strategy, each in eligible:
        found = figure(registry, strategy, each.pattern, longest, tokens)
        if not _hindrance(strategy, each, registry, tokens, found)[1]:
            usable.append((strategy, each.pattern, found))
    if not usable:
        return None
    strategy, _, found = usable[best_first(registry, usable)[0]]
    return strategy, found


def _hindrance(
    strategy: Strategy, each: Standing, registry: Registry, tokens: int, found: Figure | None
) -> tuple[Stage, tuple[Reason, ...]]:
    assert isinstance(each.site, Site)
    site = each.site.at(tokens)
    if reasons := strategy.cannot(site, each.pattern):
        return Stage.REQUIRES, reasons
    return Stage.WORTHWHILE, unprofitable(strategy, site, registry, found)


def _refusal(strategy: Strategy, each: Standing, longest: Site, registry: Registry) -> tuple[Stage, tuple[Reason, ...]]:
    """Why a strategy that could run is chosen at no token count: by itself at the least one, or for another's sake."""
    nearest: tuple[Stage, tuple[Reason, ...]] | None = None
    for tokens in SAMPLES:
        found = figure(registry, strategy, each.pattern, longest, tokens)
        stage, reasons = _hindrance(strategy, each, registry, tokens, found)
        if not reasons:
            return Stage.OUTRANKED, (Reason("outranked", "at each token count at which it pays another comes first"),)
        nearest = nearest or (stage, reasons)
    assert nearest is not None
    return nearest


def _candidate(
    place: Standing, chosen: tuple[Choice, ...], known: dict[str, Strategy], registry: Registry
) -> Candidate:
    assert place.match is not None
    assert isinstance(place.site, Site)
    used = {name: known[name] for choice in chosen if (name := choice.strategy) is not None}
    if len(chosen) == 1:
        return Candidate(used[str(chosen[0].strategy)], place.match, place.site, chosen)
    paths = tuple(
        (each.first, None if each.strategy is None or _defines(used[each.strategy], registry) else each.strategy)
        for each in chosen
    )
    from fusion_core.by_tokens import guarded  # torch.library, which a mere listing of backends does not need

    strategy = guarded(place.match, paths, used, registry.config, registry.patterns)
    return Candidate(strategy, place.match, place.site, chosen)


def _defines(strategy: Strategy, registry: Registry) -> bool:
    return is_definition(strategy, registry.patterns[strategy.pattern])
