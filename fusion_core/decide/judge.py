"""Which strategy runs at each all_reduce: a pure function of the site, the registry and the order."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from fusion_core.decide.candidate import Candidate, Standing, Verdict
from fusion_core.decide.eligibility import able, worth
from fusion_core.decide.measured import figure
from fusion_core.decide.nearest import nearest
from fusion_core.decide.ranking import Usable, best_first
from fusion_core.decide.token_ranges import judge_by_tokens
from fusion_core.decision import Choice, Decision
from fusion_core.groups import world_size
from fusion_core.lift.graph import LiftedGraph
from fusion_core.lift.term import Term, held_by
from fusion_core.match.matcher import Match, match
from fusion_core.patterns.definition import GROUP
from fusion_core.plugins.registry import Registry
from fusion_core.reason import Reason, Stage
from fusion_core.site import Device, Site, TensorMeta


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
