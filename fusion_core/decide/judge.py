"""Which strategy runs at each all_reduce: a pure function of the site, the registry and the order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from fusion_core.decide.candidate import Candidate, PatternOutcome, SiteVerdict
from fusion_core.decide.eligibility import can_run, should_run
from fusion_core.decide.measured import timing
from fusion_core.decide.nearest import nearest
from fusion_core.decide.ranking import Usable, rank_indices
from fusion_core.decide.token_ranges import choose_per_token_range
from fusion_core.decision import Choice, Decision
from fusion_core.groups import world_size
from fusion_core.lift.graph import LiftedGraph
from fusion_core.lift.term import Term, held_by
from fusion_core.match.matcher import Match, match
from fusion_core.patterns.definition import GROUP
from fusion_core.plugins.asking import Answers
from fusion_core.plugins.registry import Registry
from fusion_core.reason import Reason, Stage
from fusion_core.site import Device, Site, TensorMeta


def judge(view: LiftedGraph, anchor: fx.Node, terms: Sequence[Term], registry: Registry) -> SiteVerdict:
    """Match every pattern that starts from a collective's terms, and evaluate every strategy."""
    outcomes: list[PatternOutcome] = []
    starts = {term.word: term for term in terms}
    for pattern in sorted(registry.patterns.values(), key=lambda pattern: (-len(pattern.steps), pattern.name)):
        if pattern.collective not in starts:
            continue
        outcome = match(pattern, view, anchor, starts[pattern.collective])
        if isinstance(outcome, Match):
            outcomes.append(PatternOutcome(pattern, outcome, _site(outcome, view), len(pattern.steps)))
        else:
            outcomes.append(PatternOutcome(pattern, None, outcome.reason, outcome.depth))
    outcomes, misses = nearest(outcomes)
    longest = next((each.site for each in outcomes if isinstance(each.site, Site)), None)
    if longest is not None and longest.tokens is None:
        return replace(choose_per_token_range(outcomes, longest, registry), near_misses=misses, word=terms[0].word)
    decisions: list[Decision] = []
    candidates: list[Candidate] = []
    usable: list[Usable] = []
    for each in outcomes:
        for strategy in registry.strategies(each.pattern.name):
            found = None
            stage, reasons = can_run(strategy, each.pattern, each.answers, registry)
            if stage is Stage.CHOSEN:
                assert longest is not None
                found = timing(registry, strategy, each.pattern, longest, longest.tokens or 0)
                assert isinstance(each.answers, Answers)
                stage, reasons = should_run(strategy, each.answers, registry, found)
            decisions.append(Decision(each.pattern.name, strategy.name, stage, reasons))
            if stage is Stage.CHOSEN:
                assert each.match is not None
                assert isinstance(each.site, Site)
                choices = () if found is None else (Choice(found.tokens, strategy.name, found),)
                candidates.append(Candidate(strategy, each.match, each.site, choices))
                usable.append((strategy, each.pattern, found))
    ranked = [candidates[place] for place in rank_indices(registry, usable)]
    return SiteVerdict(longest, ranked, decisions, misses, terms[0].word)


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
