"""The pass over Inductor's post-grad graph: lift, match, decide, emit, report."""

from __future__ import annotations

import datetime
import warnings
from typing import Any

import torch
from torch import fx

from fusion_core import history
from fusion_core._inductor import CustomGraphPass, decompositions
from fusion_core.config import FusionConfig
from fusion_core.decide import Decision, Verdict, judge
from fusion_core.emit import Emitter
from fusion_core.errors import BackendError
from fusion_core.fingerprint import fingerprint, states, version
from fusion_core.lifting.collectives import has_all_reduce
from fusion_core.lifting.readings import Readings
from fusion_core.lifting.view import LiftedGraph
from fusion_core.merging import merged
from fusion_core.reason import Reason, Stage
from fusion_core.registry import Registry
from fusion_core.report import Merge, Report, SiteReport, site_attributes
from fusion_core.site import Device
from fusion_core.tracing import Unplaceable


class FusionPass(CustomGraphPass):
    """Finds every all_reduce of a graph, with what follows it, and runs it through the best usable strategy.

    For Inductor's option ``post_grad_custom_post_pass``; ``torch.compile(backend="fusion_core")`` sets it by itself.
    One object may serve many graphs, and compilations in several threads.

    Args:
        config: Which backends may run, and how; None for the defaults.
        registry: Backends that are loaded already; None to load them by their entry points.
        dry_run: Decide and report, and leave every graph as it is.

    Raises:
        BackendError: where ``config.order`` names a backend that does not load, ``config.options`` an option that no
            backend has, or ``config.strict`` and a backend does not load.
        ConfigError: where an environment variable ``FUSION_CORE_*`` cannot be used.
    """

    def __init__(
        self, config: FusionConfig | None = None, *, registry: Registry | None = None, dry_run: bool = False
    ) -> None:
        self.config = (FusionConfig() if config is None else config) if registry is None else registry.config
        self.registry = Registry.load(self.config) if registry is None else registry
        self.dry_run = dry_run
        self._uuids: dict[tuple[Device, bool, str], str] = {}

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the chosen sites of a graph and record the report; a graph without a chosen site stays as it is."""
        report = self.run(graph)
        history.record(report)
        self.registry.notify(report)

    def run(self, graph: fx.Graph) -> Report:
        """Rewrite the chosen sites of a graph and return the report."""
        device = _device(graph)
        readings = Readings(self.registry.dialects)
        if not has_all_reduce(graph, readings):
            return self._report((), (), device)
        left = self.config.limit
        merges: tuple[Merge, ...] = ()
        if self.config.merge and self.registry.backends:
            if self.dry_run:
                graph = _copy(graph)
            merges = merged(graph, readings, left)
            left = None if left is None else left - sum(not merge.reasons for merge in merges)
        view = LiftedGraph(graph, readings)
        for problem in dict.fromkeys(readings.problems):
            if self.config.strict:
                raise BackendError(problem)
            warnings.warn(f"fusion_core: {problem}", RuntimeWarning, stacklevel=2)
        emitter = Emitter(graph, view, decompositions(), self.config)
        verdicts = [(anchor, judge(view, anchor, term, self.registry)) for anchor, term in view.anchors]
        left = len(verdicts) if left is None else left
        sites = []
        for anchor, verdict in verdicts:
            site = self._settle(anchor, verdict, emitter, left > 0)
            left -= site.strategy is not None
            sites.append(site)
        return self._report(tuple(sites), merges, device)

    def _settle(self, anchor: fx.Node, verdict: Verdict, emitter: Emitter, may_rewrite: bool) -> SiteReport:
        """Rewrite one site by the first candidate that can be placed; what became of every strategy."""
        label = anchor.name  # the node is gone once the site is rewritten
        outcome: dict[str, tuple[Stage, tuple[Reason, ...]]] = {}
        chosen = None
        for candidate in verdict.candidates:
            name = candidate.strategy.name
            if chosen is not None:
                found = f"{chosen.strategy.name} comes first"
                outcome[name] = (
                    Stage.OUTRANKED,
                    (Reason("outranked", found, hint=f"order=({candidate.strategy.backend!r},) chooses it"),),
                )
            elif not may_rewrite:
                found = f"limit is {self.config.limit} rewrites"
                outcome[name] = Stage.OUTRANKED, (Reason("limit", found, "a higher limit"),)
            else:
                try:
                    plan = emitter.plan(candidate)
                except Unplaceable as error:
                    outcome[name] = Stage.REPLACEMENT, (error.reason,)
                    continue
                emitter.claim(plan)
                if not self.dry_run:
                    emitter.apply(plan)
                chosen = candidate
        decisions = tuple(
            Decision(d.pattern, d.strategy, *outcome[d.strategy]) if d.strategy in outcome else d
            for d in verdict.decisions
        )
        site = chosen.site if chosen is not None else verdict.site
        attributes = site_attributes(site) if site is not None else {}
        pattern = site.pattern if site is not None else "all_reduce"
        return SiteReport(pattern, chosen.strategy.name if chosen is not None else None, label, attributes, decisions)

    def _report(self, sites: tuple[SiteReport, ...], merges: tuple[Merge, ...], device: Device) -> Report:
        registry = self.registry
        return Report(
            sites,
            tuple(map(str, registry.failures)),
            {name: reasons for name in registry.backends if (reasons := registry.unavailable(name, device))}
            if sites
            else {},
            str(device),
            tuple(registry.backends),
            "explained" if self.dry_run else "compiled",
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            {"fusion_core": version(), "torch": torch.__version__},
            merges,
        )

    def uuid(self) -> str:
        """A key of everything that the pass's work hangs on; Inductor's compile cache uses it."""
        # the rest is fixed; Inductor asks several times for each graph
        key = Device.here(), self.dry_run, states(self.registry)
        if key not in self._uuids:
            self._uuids[key] = fingerprint(self.registry, self.dry_run)
        return self._uuids[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> FusionPass:
        return self  # Inductor copies its configuration, and modules of plugins cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.config, self.dry_run)


def _again(config: FusionConfig, dry_run: bool) -> FusionPass:
    return FusionPass(config, dry_run=dry_run)


def _copy(graph: fx.Graph) -> fx.Graph:
    """The same nodes under the same names, to be changed."""
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
