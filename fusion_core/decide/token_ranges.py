"""The choice at a site whose token count is known only at run time: one for every count, made at compile time.

The choice for a count is that for a site of this size. Requirements list the counts at which their answers change
(`Terms`), and the choice is made at those counts. A requirement that cannot list them is asked at each call. The choice
is then a list, and the first entry whose requirements the call meets runs. Timings are looked up at powers of two. If
the choice differs between two of these, bisection finds where it changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from fusion_core.config import DETERMINISTIC
from fusion_core.decide.candidate import Candidate, PatternOutcome, SiteVerdict
from fusion_core.decide.eligibility import can_run, why_not_faster
from fusion_core.decide.measured import timing
from fusion_core.decide.ranking import Usable, rank_indices
from fusion_core.decision import Choice, Decision, Timing
from fusion_core.dispatch.by_tokens import guarded
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.asking import Answers, Terms, text_of
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason, Stage
from fusion_core.site import Site
from fusion_core.site.run_time import to_data

BARE = "all_reduce"

SAMPLES = tuple(1 << power for power in range(22))
"""Token counts at which timings are looked up; between two with the same choice, no other choice is searched for."""


@dataclass(frozen=True, eq=False)
class Eligible:
    """A strategy that can run at some token counts of a site, and the answers of its requirements by count."""

    strategy: Strategy
    outcome: PatternOutcome
    requires: Terms
    worthwhile: Terms

    @classmethod
    def of(cls, strategy: Strategy, outcome: PatternOutcome) -> Eligible:
        """Ask a strategy's requirements about a site."""
        assert isinstance(outcome.answers, Answers)
        return cls(strategy, outcome, *(Terms(e, outcome.answers) for e in (strategy.requires, strategy.worthwhile)))

    @property
    def pattern(self) -> Pattern:
        """The strategy's pattern."""
        return self.outcome.pattern

    @property
    def defines(self) -> bool:
        """Whether it is its pattern's own definition."""
        return self.strategy.is_definition(self.pattern)

    def asks(self, registry: Registry, found: Timing | None) -> tuple[int, ...]:
        """The requirements that each call asks: indices into the strategy's ``requires + worthwhile``."""
        measured = found is not None or registry.config.numerics == DETERMINISTIC
        later = () if measured else self.worthwhile.each_call
        return *self.requires.each_call, *(len(self.strategy.requires) + place for place in later)


Alternatives = tuple[tuple[Eligible | None, Timing | None, tuple[int, ...]], ...]
"""What may run at a token count, in order of preference: the last one asks nothing of the call."""

Chosen = tuple[Choice, tuple[int, ...]]
"""A choice, and the indices of the requirements of its strategy that each call asks."""

Refused = dict[str, tuple[Stage, tuple[Reason, ...]]]
"""Strategy → why it is not chosen."""

_known: WeakKeyDictionary[Registry, dict[str, tuple[str, tuple[Chosen, ...], Refused]]] = WeakKeyDictionary()
"""The decision for all sites of one form, by the text of the form."""


def choose_per_token_range(outcomes: Sequence[PatternOutcome], longest: Site, registry: Registry) -> SiteVerdict:
    """Evaluate every strategy at every token count, and combine the choices into one candidate.

    Args:
        outcomes: The patterns at one all_reduce, the longest first.
        longest: The site of the longest of them that matches.
        registry: The installed backends and the configuration.
    """
    decisions: dict[str, Decision] = {}
    can_run_here: list[tuple[Strategy, PatternOutcome]] = []
    for each in outcomes:
        for strategy in registry.strategies(each.pattern.name):
            stage, reasons = can_run(strategy, each.pattern, each.answers, registry)
            if stage is Stage.CHOSEN and (off := strategy.switched_off(registry.config)):
                stage, reasons = Stage.OPTION, off
            decisions[strategy.name] = Decision(each.pattern.name, strategy.name, stage, reasons)
            if stage is Stage.CHOSEN:
                can_run_here.append((strategy, each))
    # most layers of a model have sites of the same form
    form = repr([replace(each.site, node="") for each in outcomes if isinstance(each.site, Site)])
    known = _known.setdefault(registry, {})
    if form not in known:
        eligible = [Eligible.of(strategy, each) for strategy, each in can_run_here]
        known[form] = _choose(eligible, longest, registry)
    pattern, chosen, refused = known[form]
    for name, (stage, reasons) in refused.items():
        decisions[name] = replace(decisions[name], stage=stage, reasons=reasons)
    candidates = []
    if chosen:
        place = next(each for each in outcomes if each.pattern.name == pattern)
        candidates.append(
            _candidate(place, chosen, {strategy.name: strategy for strategy, _ in can_run_here}, registry)
        )
    return SiteVerdict(longest, candidates, list(decisions.values()))


def _choose(eligible: Sequence[Eligible], longest: Site, registry: Registry) -> tuple[str, tuple[Chosen, ...], Refused]:
    """The pattern to replace, the choices for it, and why the other strategies are not chosen."""
    found: tuple[str, tuple[Chosen, ...]] = ("", ())
    for pattern in dict.fromkeys(each.pattern.name for each in eligible):
        # an operator runs a whole pattern, or the bare all_reduce followed by the rest of the pattern
        here = [each for each in eligible if each.pattern.name in (pattern, BARE)]
        own = {each.strategy.name for each in here if each.pattern.name == pattern and not each.defines}
        chosen = choices(here, longest, registry) if own else ()
        if any(choice.strategy in own for choice, _ in chosen):
            found = pattern, chosen
            break
    else:  # at most definitions, which Inductor decomposes at any size
        chosen = choices([each for each in eligible if each.defines], longest, registry)
        names = {choice.strategy for choice, _ in chosen}
        pattern = next((each.pattern.name for each in eligible if each.strategy.name in names), "")
        found = pattern, chosen
    used = {choice.strategy for choice, _ in found[1]}
    others = {
        each.strategy.name: _refusal(each, longest, registry) for each in eligible if each.strategy.name not in used
    }
    return *found, others


def choices(eligible: Sequence[Eligible], longest: Site, registry: Registry) -> tuple[Chosen, ...]:
    """What runs from which token count on; empty if only torch's own path ever runs."""

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


def _chosen(first: int, each: Eligible | None, found: Timing | None, asks: tuple[int, ...]) -> Chosen:
    if each is None:
        return Choice(first, None), ()
    declared = (*each.strategy.requires, *each.strategy.worthwhile)
    return Choice(first, each.strategy.name, found, tuple(text_of(declared[place]) for place in asks)), asks


def _looked_at(eligible: Sequence[Eligible], registry: Registry) -> list[int]:
    """Token counts to evaluate: the samples, and both sides of each count at which an answer may change."""
    changes = {count for each in eligible for terms in (each.requires, each.worthwhile) for count in terms.changes}
    if registry.config.max_tokens is not None:
        changes.add(registry.config.max_tokens + 1)
    return sorted({1, *SAMPLES, *(side for count in changes for side in (count - 1, count) if side > 0)})


def _change(name: Callable[[int], tuple[Any, ...]], low: int, high: int) -> int:
    """The token count after ``low`` at which the choice changes, by bisection; at ``high`` it is another one."""
    before = name(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if name(middle) == before else (low, middle)
    return high


def _best(eligible: Sequence[Eligible], longest: Site, registry: Registry, tokens: int) -> Alternatives:
    usable: list[Usable] = []
    here: list[Eligible] = []
    for each in eligible:
        found = timing(registry, each.strategy, each.pattern, longest, tokens)
        if not _hindrance(each, registry, tokens, found)[1]:
            usable.append((each.strategy, each.pattern, found))
            here.append(each)
    preferred: list[tuple[Eligible | None, Timing | None, tuple[int, ...]]] = []
    for place in rank_indices(registry, usable):
        found = usable[place][2]
        preferred.append((here[place], found, here[place].asks(registry, found)))
        if not preferred[-1][2]:
            return tuple(preferred)
    return (*preferred, (None, None, ()))


def _hindrance(
    each: Eligible, registry: Registry, tokens: int, found: Timing | None
) -> tuple[Stage, tuple[Reason, ...]]:
    answers = each.outcome.by_tokens(tokens)
    if reasons := each.requires.unmet(answers):
        return Stage.REQUIRES, reasons
    declared = functools.partial(each.worthwhile.unmet, answers)
    return Stage.WORTHWHILE, why_not_faster(each.strategy, answers.site, registry, found, declared)


def _refusal(each: Eligible, longest: Site, registry: Registry) -> tuple[Stage, tuple[Reason, ...]]:
    """Why a strategy is chosen at no token count: its own reasons at the smallest one, or that others come first."""
    nearest: tuple[Stage, tuple[Reason, ...]] | None = None
    for tokens in _looked_at([each], registry):
        found = timing(registry, each.strategy, each.pattern, longest, tokens)
        stage, reasons = _hindrance(each, registry, tokens, found)
        if not reasons:
            return Stage.OUTRANKED, (Reason("outranked", "at each token count at which it pays another comes first"),)
        nearest = nearest or (stage, reasons)
    assert nearest is not None
    return nearest


def _candidate(
    place: PatternOutcome, chosen: tuple[Chosen, ...], known: dict[str, Strategy], registry: Registry
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
