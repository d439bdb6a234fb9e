"""Which strategy runs at each all_reduce: a pure function of the site, the registry and the order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fusion_core.groups import world_size
from fusion_core.lifting.term import Term, held_by
from fusion_core.lifting.view import LiftedGraph
from fusion_core.match import Match, match
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


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """A strategy that can and should run at a site, and the match that it would replace."""

    strategy: Strategy
    match: Match
    site: Site


@dataclass(frozen=True, eq=False)
class Verdict:
    """All that was found at one all_reduce.

    Attributes:
        site: The longest pattern that stands there; None where not even the bare all_reduce does.
        candidates: Usable strategies, best first.
        decisions: One for every strategy of every pattern, longest pattern first.
    """

    site: Site | None
    candidates: list[Candidate]
    decisions: list[Decision]


def judge(view: LiftedGraph, anchor: fx.Node, term: Term, registry: Registry) -> Verdict:
    """Match every pattern at an all_reduce and ask every strategy."""
    sites: list[Site] = []
    decisions: list[Decision] = []
    candidates: list[Candidate] = []
    for pattern in sorted(registry.patterns.values(), key=lambda pattern: (-len(pattern.steps), pattern.name)):
        outcome = match(pattern, view, anchor, term)
        site = _site(outcome, view) if isinstance(outcome, Match) else outcome
        if isinstance(site, Site):
            sites.append(site)
        for strategy in registry.strategies(pattern.name):
            stage, reasons = weigh(strategy, pattern, site, registry)
            decisions.append(Decision(pattern.name, strategy.name, stage, reasons))
            if stage is Stage.CHOSEN:
                assert isinstance(outcome, Match)
                assert isinstance(site, Site)
                candidates.append(Candidate(strategy, outcome, site))
    candidates.sort(key=lambda c: preference(registry, c.strategy, c.match.pattern))
    return Verdict(sites[0] if sites else None, candidates, decisions)


def weigh(
    strategy: Strategy, pattern: Pattern, site: Site | Reason, registry: Registry
) -> tuple[Stage, tuple[Reason, ...]]:
    """How far one strategy gets at one site by itself; `Stage.CHOSEN` where nothing speaks against it."""
    if isinstance(site, Site) and (reasons := registry.unavailable(strategy.backend, site.device)):
        return Stage.UNAVAILABLE, reasons
    if isinstance(site, Reason):
        return Stage.STRUCTURE, (site,)
    if reasons := strategy.cannot(site, pattern):
        return Stage.REQUIRES, reasons
    if reasons := strategy.should_not(site):
        return Stage.WORTHWHILE, reasons
    if reasons := strategy.switched_off(registry.config):
        return Stage.OPTION, reasons
    return Stage.CHOSEN, ()


def preference(registry: Registry, strategy: Strategy, pattern: Pattern) -> tuple[object, ...]:
    """The key that sorts strategies which can and should run, best first.

    Backends that the user put in an order come in that order; among those of one tier, the longest pattern first,
    then the backends' names, then the strategies' own rank and name.
    """
    tier = next(index for index, names in enumerate(registry.tiers) if strategy.backend in names)
    return tier, -len(pattern.steps), strategy.backend, -strategy.rank, strategy.name


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
