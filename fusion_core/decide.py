"""Which strategy runs at each all_reduce: a pure function of the site, the registry and the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from fusion_core.asking import looks_at_tokens, shown
from fusion_core.config import DETERMINISTIC
from fusion_core.figures import Figure, figure
from fusion_core.groups import world_size
from fusion_core.lifting.term import Term, held_by
from fusion_core.lifting.view import LiftedGraph
from fusion_core.match import Match, match
from fusion_core.nearest import NearMiss, Standing, nearest
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.reason import Reason, Stage
from fusion_core.registry import Registry
from fusion_core.site import Device, Site, TensorMeta
from fusion_core.strategy import Strategy


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


def judge(view: LiftedGraph, anchor: fx.Node, term: Term, registry: Registry) -> Verdict:
    """Match every pattern at an all_reduce and ask every strategy."""
    standings: list[Standing] = []
    for pattern in sorted(registry.patterns.values(), key=lambda pattern: (-len(pattern.steps), pattern.name)):
        outcome = match(pattern, view, anchor, term)
        if isinstance(outcome, Match):
            standings.append(Standing(pattern, outcome, _site(outcome, view), len(pattern.steps)))
        else:
            standings.append(Standing(pattern, None, outcome.reason, outcome.depth))
    standings, misses = nearest(standings)
    longest = next((each.site for each in standings if isinstance(each.site, Site)), None)
    if longest is not None and longest.tokens is None:
        from fusion_core.choosing import judge_by_tokens

        return replace(judge_by_tokens(standings, longest, registry), near_misses=misses)
    decisions: list[Decision] = []
    candidates: list[Candidate] = []
    usable: list[Usable] = []
    for each in standings:
        for strategy in registry.strategies(each.pattern.name):
            found = None
            stage, reasons = able(strategy, each.pattern, each.site, registry)
            if stage is Stage.CHOSEN:
                assert longest is not None
                found = figure(registry, strategy, each.pattern, longest, longest.tokens or 0)
                assert isinstance(each.site, Site)
                stage, reasons = worth(strategy, each.site, registry, found)
            decisions.append(Decision(each.pattern.name, strategy.name, stage, reasons))
            if stage is Stage.CHOSEN:
                assert each.match is not None
                assert isinstance(each.site, Site)
                choices = () if found is None else (Choice(found.tokens, strategy.name, found),)
                candidates.append(Candidate(strategy, each.match, each.site, choices))
                usable.append((strategy, each.pattern, found))
    return Verdict(longest, [candidates[place] for place in best_first(registry, usable)], decisions, misses)


def weigh(
    strategy: Strategy, pattern: Pattern, site: Site | Reason, registry: Registry, found: Figure | None = None
) -> tuple[Stage, tuple[Reason, ...]]:
    """How far one strategy gets at one site by itself; `Stage.CHOSEN` where nothing speaks against it.

    Args:
        strategy: The strategy.
        pattern: Its pattern.
        site: Where that stands, or why it does not.
        registry: What is installed and configured.
        found: What was measured of it there.
    """
    stage, reasons = able(strategy, pattern, site, registry)
    if stage is not Stage.CHOSEN:
        return stage, reasons
    assert isinstance(site, Site)
    return worth(strategy, site, registry, found)


def worth(strategy: Strategy, site: Site, registry: Registry, found: Figure | None) -> tuple[Stage, tuple[Reason, ...]]:
    """Whether a strategy that can run at a site of known size should, and may: `Stage.CHOSEN`, or why not."""
    if reasons := unprofitable(strategy, site, registry, found):
        return Stage.WORTHWHILE, reasons
    if reasons := strategy.switched_off(registry.config):
        return Stage.OPTION, reasons
    return Stage.CHOSEN, ()


def able(
    strategy: Strategy, pattern: Pattern, site: Site | Reason, registry: Registry
) -> tuple[Stage, tuple[Reason, ...]]:
    """Whether a strategy can run at a site, whatever it costs: `Stage.CHOSEN`, or how far it gets and why not on."""
    if isinstance(site, Site) and (reasons := registry.unavailable(strategy.backend, site.device)):
        return Stage.UNAVAILABLE, reasons
    if isinstance(site, Reason):
        return Stage.STRUCTURE, (site,)
    reasons = strategy.cannot(site, pattern)
    if registry.config.numerics == DETERMINISTIC:
        reasons += _not_for_every_batch(strategy, site)
    return (Stage.REQUIRES, reasons) if reasons else (Stage.CHOSEN, ())


def _not_for_every_batch(strategy: Strategy, site: Site) -> tuple[Reason, ...]:
    """Why a strategy gives a row other bits in another batch, or does not run there at all."""
    hint = "numerics='default' allows it"
    if not strategy.batch_invariant:
        found = f"{strategy.name} may give a row other bits in another batch"
        return (Reason("numerics", found, "a batch-invariant strategy", hint=hint),)
    limits = [shown(each) for each in strategy.requires if looks_at_tokens(each, site)]
    found = f"{strategy.name} runs at some numbers of tokens only ({'; '.join(limits)})"
    return (Reason("numerics", found, "one that runs in every batch", hint=hint),) if limits else ()


def unprofitable(
    strategy: Strategy,
    site: Site,
    registry: Registry,
    found: Figure | None,
    declared: Callable[[], tuple[Reason, ...]] | None = None,
) -> tuple[Reason, ...]:
    """Why a strategy that can run at a site of known size should not. What was measured goes before what is declared.

    Never for deterministic numerics: nothing about the batch may decide there.

    Args:
        strategy: The strategy.
        site: The site.
        registry: What is installed and configured.
        found: What was measured of it there.
        declared: What it declares there; None to ask it.
    """
    config = registry.config
    if config.numerics == DETERMINISTIC:
        return ()
    tokens = site.tokens
    takes = "max_tokens" in strategy.settings(registry.patterns[strategy.pattern], config)
    if takes and config.max_tokens is not None and tokens is not None and tokens > config.max_tokens:
        return (Reason("max_tokens", f"{tokens} tokens are more than max_tokens", f"at most {config.max_tokens}"),)
    if found is None:
        return strategy.should_not(site) if declared is None else declared()
    slower = found.slower()
    return () if slower is None else (slower,)


TIE = 0.02
"""Part of a time within which two measured ones are a tie: measuring anew may well turn them round."""

Usable = tuple[Strategy, Pattern, Figure | None]
"""A strategy that can and should run, its pattern, and what was measured of it."""


def best_first(registry: Registry, usable: Sequence[Usable]) -> list[int]:
    """The places of usable strategies, best first.

    Backends that the user put in an order come in that order. Then what was measured, the fastest first, where the
    longest pattern wins a tie: it leaves the fewest kernels. Then the longest pattern, backends by name with reference
    last, and the strategies' own rank and name.
    """
    ordered = registry.config.order is not None
    tiers = {name: tier for tier, names in enumerate(registry.tiers) for name in names}
    most: dict[int, float] = {}
    for strategy, _, found in usable:
        if found is not None and found.us is not None:
            tier = tiers[strategy.backend] if ordered else 0
            most[tier] = max(most.get(tier, 0.0), found.unfused_us - found.us)

    def key(place: int) -> tuple[object, ...]:
        strategy, pattern, found = usable[place]
        tier = tiers[strategy.backend]
        speed: tuple[object, ...] = (True, 0.0)
        if found is not None and found.us is not None:
            behind = most[tier if ordered else 0] - (found.unfused_us - found.us)
            speed = (False, 0.0 if behind <= TIE * found.us else behind)
        by_speed = (tier, *speed) if ordered else (*speed, tier)
        return *by_speed, -len(pattern.steps), strategy.backend, -strategy.rank, strategy.name

    return sorted(range(len(usable)), key=key)


def _site(found: Match, view: LiftedGraph) -> Site | Reason:
    group = found.bound[GROUP]
    size = world_size(group) if isinstance(group, str) else None
    if size is None:
        return Reason(
            "group", f"the process group is {group!r}, which this process does not know", "an initialised group"
        )
    x: fx.Node = found.bound["x"]
    value = x.meta["val"]
    inputs, attributes, devices = {}, {}, set()
    for name, parameter in found.pattern.parameters.items():
        bound = found.bound.get(name, parameter.default)
        if (node := held_by(bound)) is not None:
            inputs[name] = TensorMeta.of(node.meta["val"])
            devices.add(node.meta["val"].device)
        elif parameter.is_tensor and bound is not None:
            return Reason("argument", f"{name} is {bound!r}", "a tensor", name)
        elif not parameter.is_tensor:
            attributes[name] = bound
    if len(devices) > 1:
        return Reason("device", "the inputs are on several devices", "one device")
    outputs = {name: TensorMeta.of(node.meta["val"]) for name, node in found.outputs.items()}
    attributes |= found.notes
    return Site(
        found.pattern.name, found.anchor.name, inputs, outputs, attributes, Device.of(value.device), size, group
    )
