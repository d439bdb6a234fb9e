"""The pass over Inductor's post-grad graph: lift, match, decide, emit, report."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fusion_core._torch.inductor import CustomGraphPass, NotCached, decompositions
from fusion_core.agree.ranks import AgreedState, agree, settled_everywhere, settled_so_far, will_ask
from fusion_core.config import DETERMINISTIC, FusionConfig
from fusion_core.decide.candidate import SiteVerdict
from fusion_core.decide.judge import judge
from fusion_core.decision import Decision
from fusion_core.emit.emitter import Emitter
from fusion_core.emit.merge import merge_all_reduces, mergeable
from fusion_core.emit.narrow import narrow
from fusion_core.emit.trace import Unplaceable
from fusion_core.errors import BackendError
from fusion_core.groups import group_name, world_size
from fusion_core.lift.collectives import all_reduces, has_all_reduce
from fusion_core.lift.gathers import Gathers
from fusion_core.lift.graph import LiftedGraph
from fusion_core.lift.readings import Readings
from fusion_core.plugins.asking import FAILED
from fusion_core.plugins.fingerprint import fingerprint, states, tables, version
from fusion_core.plugins.once import warn_once
from fusion_core.plugins.registry import Registry
from fusion_core.reason import TUNE, Reason, Stage
from fusion_core.report import history
from fusion_core.report.record import Merge, SiteReport, site_attributes
from fusion_core.report.report import Report
from fusion_core.site import Device
from fusion_core.tables.store import NONE


class FusionPass(CustomGraphPass):
    """Replaces each all_reduce of a graph, and the code that follows it, by the best usable strategy.

    For Inductor's option ``post_grad_custom_post_pass``; ``torch.compile(backend="fusion_core")`` sets it by itself.
    One object can be used for many graphs, and from several threads. The ranks of each process group first agree on
    the backends that all of them have; see `among`.

    Args:
        config: Which backends may run, and how; None for the defaults.
        registry: The loaded backends; None to load them by their entry points.
        dry_run: Decide and report, but rewrite only a copy of each graph.

    Raises:
        BackendError: if ``config.order`` names a backend that does not load, if ``config.options`` names an option that
            no backend has, or if any backend does not load under ``config.strict``.
        ConfigError: if an environment variable ``FUSION_CORE_*`` cannot be used.
    """

    def __init__(
        self, config: FusionConfig | None = None, *, registry: Registry | None = None, dry_run: bool = False
    ) -> None:
        self.config = (FusionConfig() if config is None else config) if registry is None else registry.config
        self.registry = Registry.load(self.config) if registry is None else registry
        self.dry_run = dry_run
        self._uuids: dict[tuple[Device, bool, str], str] = {}
        self._common: AgreedState | None = None
        if not dry_run:
            will_ask(self.registry)

    def among(self, *groups: dist.ProcessGroup | str | None) -> FusionPass:
        """The pass for graphs whose all_reduces are in these process groups; it fuses nothing in other groups.

        Collective: the ranks of each group agree here on the backends they share, and wait for each other. Without this
        call, the pass agrees on a graph's groups when it runs on the graph. It then keeps the graph out of Inductor's
        cache if this process is in a group with other ranks that has no agreement yet.

        Args:
            *groups: The groups or their names; None for the default group.

        Raises:
            ConfigError: if torch.distributed is not initialised, or has no group of a given name.
        """
        found = FusionPass(registry=self.registry, dry_run=self.dry_run)
        found._uuids = self._uuids
        found._common = agree(map(group_name, groups), self.registry)
        return found

    def _agreed(self, groups: Iterable[str]) -> AgreedState:
        if self._common is not None:
            return self._common
        return settled_so_far(groups, self.registry) if self.dry_run else agree(groups, self.registry)

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the chosen sites of a graph and record the report; a graph without chosen sites is not changed."""
        report = self.run(graph)
        history.record(report, self.config.reports)
        self.registry.notify(report)

    def run(self, graph: fx.Graph) -> Report:
        """Rewrite the chosen sites of a graph (of a copy, in a dry run) and return the report."""
        device = _device(graph)
        readings = Readings(self.registry.dialects)
        gathers = Gathers(graph)
        if not has_all_reduce(graph, readings) and not gathers:
            return self._report((), (), device)
        named = [term.operands["group"] for _, term in all_reduces(graph, readings)]
        named += [gather.group for gather in gathers.found.values()]
        groups = [group for group in dict.fromkeys(named) if isinstance(group, str)]
        common = self._agreed(groups)
        if self.dry_run:  # rewrite a copy, so that every rewrite in the report has been done once
            graph = _copy(graph)
            gathers = Gathers(graph)
        left = self.config.limit
        merges: tuple[Merge, ...] = ()
        if self.registry.backends:
            merging = self.config.merge
            merges = (
                merge_all_reduces(graph, readings, left, common.unmerged) if merging else mergeable(graph, readings)
            )
            left = None if left is None else left - sum(not merge.reasons for merge in merges)
            if gathers and left != 0:
                narrow(graph, gathers)
        view = LiftedGraph(graph, readings)
        for problem in dict.fromkeys(readings.problems):
            if self.config.strict:
                raise BackendError(problem)
            warn_once(problem)
        emitter = Emitter(graph, view, decompositions(), self.config)
        verdicts = []
        for anchor, terms in view.anchors:
            group = terms[0].operands["group"]
            usable = common.registry(self.registry, group) if isinstance(group, str) else self.registry
            verdicts.append((anchor, judge(view, anchor, terms, usable)))
        self._warn_of_broken(verdict for _, verdict in verdicts)
        left = len(verdicts) if left is None else left
        sites = []
        shared: dict[tuple[Decision, ...], tuple[Decision, ...]] = {}  # most layers of a model are the same
        for anchor, verdict in verdicts:
            if anchor in emitter.taken:
                continue  # a part of the site before it
            site = self._settle(anchor, verdict, emitter, left > 0)
            left -= site.strategy is not None
            sites.append(replace(site, decisions=shared.setdefault(site.decisions, site.decisions)))
        emitter.seal()
        return self._report(tuple(sites), merges, device, common.reasons(groups), *self._tables(groups, common, device))

    def _warn_of_broken(self, verdicts: Iterable[SiteVerdict]) -> None:
        """Warn about strategies whose requirements raise or return something other than a reason; raise if strict."""
        decisions = [decision for verdict in verdicts for decision in verdict.decisions]
        broken = [f"{d.strategy}: {reason}" for d in decisions for reason in d.reasons if reason.code == FAILED]
        for found in dict.fromkeys(broken):
            if self.config.strict:
                raise BackendError(found)
            warn_once(found, 3)

    def _settle(self, anchor: fx.Node, verdict: SiteVerdict, emitter: Emitter, may_rewrite: bool) -> SiteReport:
        """Rewrite one site with the first candidate that can be placed; returns the outcome for every strategy."""
        label = anchor.name  # the node is gone once the site is rewritten
        outcome: dict[str | None, tuple[Stage, tuple[Reason, ...]]] = {}
        chosen = None
        for candidate in verdict.candidates:
            # an operator that dispatches by the token count represents all the strategies that it picks from
            names = {candidate.strategy.name, *(each.strategy for each in candidate.choices)} - {None}
            if chosen is not None:
                found = f"{chosen.strategy.name} comes first"
                hint = f"order=({candidate.strategy.backend!r},) chooses it"
                outcome |= dict.fromkeys(names, (Stage.OUTRANKED, (Reason("outranked", found, hint=hint),)))
            elif not may_rewrite:
                found = f"limit is {self.config.limit} rewrites"
                outcome |= dict.fromkeys(names, (Stage.OUTRANKED, (Reason("limit", found, "a higher limit"),)))
            else:
                try:
                    emitter.apply(emitter.plan(candidate))
                except Unplaceable as error:
                    outcome |= dict.fromkeys(names, (Stage.REPLACEMENT, (error.reason,)))
                    continue
                chosen = candidate
        decisions = tuple(
            Decision(d.pattern, d.strategy, *outcome[d.strategy]) if d.strategy in outcome else d
            for d in verdict.decisions
        )
        site = chosen.site if chosen is not None else verdict.site
        attributes = site_attributes(site) if site is not None else {}
        pattern = site.pattern if site is not None else verdict.word
        collective = "all_reduce" if verdict.word == "all_reduce" else "all_gather"
        if chosen is None:
            missed = verdict.near_misses
            return SiteReport(pattern, None, label, attributes, decisions, (), missed, collective=collective)
        as_before = chosen.strategy.is_definition(self.registry.patterns[chosen.strategy.pattern])
        name, choices = chosen.strategy.name, chosen.choices
        missed = verdict.near_misses
        return SiteReport(
            pattern, name, label, attributes, decisions, choices, missed, as_before, collective=collective
        )

    def _tables(
        self, groups: Iterable[str], common: AgreedState, device: Device
    ) -> tuple[dict[str, str], dict[str, tuple[Reason, ...]]]:
        """The tuning table used for each process group, and for groups on GPUs without one, why there is none."""
        used: dict[str, str] = {}
        untuned: dict[str, tuple[Reason, ...]] = {}
        if self.config.numerics == DETERMINISTIC:  # no measured time is used then
            return used, untuned
        for group in groups:
            registry, size = common.registry(self.registry, group), world_size(group)
            if size is None or not registry.backends:
                continue
            found = registry.found_table(device, size)
            if found.table is not None:
                used[group] = found.origin
            elif device.type == "cuda" and size > 1 and self.config.table != NONE and not common.reasons((group,)):
                nothing = Reason("table", f"none for {size} ranks on {device}", "one", hint=TUNE)
                untuned[group] = found.problems or (nothing,)
        return used, untuned

    def _report(
        self,
        sites: tuple[SiteReport, ...],
        merges: tuple[Merge, ...],
        device: Device,
        disagreements: Mapping[str, tuple[Reason, ...]] = MappingProxyType({}),
        tables: Mapping[str, str] = MappingProxyType({}),
        untuned: Mapping[str, tuple[Reason, ...]] = MappingProxyType({}),
    ) -> Report:
        registry = self.registry
        here = registry.backends if sites else ()
        unavailable = {name: found for name in here if (found := registry.unavailable(name, device))}
        return Report(
            sites=sites,
            failures=tuple(map(str, registry.failures)),
            unavailable=unavailable,
            device=str(device),
            order=tuple(registry.backends),
            origin="explained" if self.dry_run else "compiled",
            compiled_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions={"fusion_core": version(), "torch": torch.__version__},
            merges=merges,
            disagreements=disagreements,
            tables=tables,
            untuned=untuned,
        )

    def uuid(self) -> str:
        """A key of everything that the pass's work depends on, for Inductor's compile cache.

        A false one, which never occurs again, keeps a graph out of the cache: if a dialect's state cannot be read, and
        while ranks have yet to agree, since a rank that takes its graph from the cache never runs the pass.
        """
        common = self._common
        if common is None and not self.dry_run:
            common = settled_everywhere(self.registry)
            if common is None:
                return NotCached()
        try:
            state = states(self.registry)
        except BackendError as error:
            warn_once(f"{error}; graphs are compiled anew instead of taken from the cache")
            return NotCached()
        # the rest is fixed, and Inductor calls this several times per graph
        key = Device.here(), self.dry_run, state
        if key not in self._uuids:
            self._uuids[key] = fingerprint(self.registry, self.dry_run)
        return self._uuids[key] + tables(self.registry) + (common.key if common is not None else "")

    def __deepcopy__(self, memo: dict[int, Any]) -> FusionPass:
        return self  # Inductor copies its configuration, and the plugins' modules cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.config, self.dry_run)


def _again(config: FusionConfig, dry_run: bool) -> FusionPass:
    return FusionPass(config, dry_run=dry_run)


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy with the same nodes and names."""
    found = fx.Graph()
    output: Any = found.graph_copy(graph, {}, return_output_node=True)
    if output is not None:
        value, source = output
        found.output(value).meta |= source.meta
    return found


def _device(graph: fx.Graph) -> Device:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return Device.of(value.device)
    return Device("cpu")
