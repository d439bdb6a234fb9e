"""Every decision about one graph, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fusion_core.decision import Choice, Decision, NearMiss
from fusion_core.fallback import fallen_back
from fusion_core.reason import Reason
from fusion_core.site import Site

SCHEMA = 3
"""Version of the JSON form; it changes if a reader of the old form would misread the new one."""


class Outcome(StrEnum):
    """What became of one all_reduce."""

    KERNEL = "on a kernel"
    """It runs on another implementation than the model's own."""
    MERGED = "merged"
    """It replaces several all_reduces; the sum itself runs as in the model."""
    AS_BEFORE = "as before"
    """It is recognised, and the model's own implementation is the best known."""
    RAN_UNFUSED = "unfused at run time"
    """The chosen kernel could not run, so torch's all_reduce runs in its place."""
    REFUSED = "refused"
    """No strategy was chosen."""


@dataclass(frozen=True)
class SiteReport:
    """What was decided at one all_reduce, or at an all_gather of split vectors.

    Attributes:
        pattern: The pattern that is fused; if none is, the longest one that matches, or ``"all_reduce"``.
        strategy: ``"backend.name"``, or None if nothing is fused.
        node: A label of the collective.
        attributes: The pattern's scalars (``eps``, ``weight_bias``, ...), its tensors as text under ``inputs``, the
            names of its live outputs under ``live``, the ``group`` and the ``world_size``.
        decisions: For every strategy of every pattern, the last stage it reached and the reasons.
        choices: The strategies by token count, with their times if they were measured: one for a site of fixed size,
            several if an operator picks by the count at run time. Empty if nothing was measured.
        near_misses: Longer patterns that nearly match, with the reasons; if only the all_reduce matches, what follows
            it instead.
        is_definition: Whether the strategy is the pattern's own definition, which Inductor compiles as it compiles
            the model's code.
        graph: The graph's number from 1 in a report of several graphs, 0 in a report of one.
        collective: What it is in the model: ``"all_reduce"``, or ``"all_gather"`` of vectors of which the rank then
            uses its own part.
    """

    pattern: str
    strategy: str | None
    node: str
    attributes: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    choices: tuple[Choice, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    is_definition: bool = False
    graph: int = 0
    collective: str = "all_reduce"

    @property
    def label(self) -> str:
        """A label that is unique in the report."""
        return f"graph {self.graph}: {self.node}" if self.graph else self.node

    @property
    def outcome(self) -> Outcome:
        """What became of it; computed at each access, since its calls come later."""
        if self.strategy is None:
            return Outcome.REFUSED
        if self.is_definition:
            return Outcome.AS_BEFORE
        return Outcome.RAN_UNFUSED if self.run_time else Outcome.KERNEL

    @property
    def run_time(self) -> tuple[Reason, ...]:
        """Why its strategy runs unfused in this process; computed at each access, since its calls come later."""
        return tuple(dict.fromkeys(reason for _, reason in self.fallen_back))

    @property
    def fallen_back(self) -> tuple[tuple[str, Reason], ...]:
        """Strategies chosen there, at any token count, that run unfused in this process, each with a reason."""
        names = dict.fromkeys(name for name in (self.strategy, *(c.strategy for c in self.choices)) if name is not None)
        group = self.attributes.get("group", "")
        return tuple((name, reason) for name in names for reason in fallen_back(name, group))


@dataclass(frozen=True)
class Merge:
    """All_reduces whose results are added together.

    Attributes:
        nodes: Their labels, in graph order.
        reasons: Why they are not merged; empty if the last one now reduces the sum of all.
        graph: The graph's number from 1 in a report of several graphs, 0 in a report of one.
    """

    nodes: tuple[str, ...]
    reasons: tuple[Reason, ...] = ()
    graph: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """The fields of a `fusion_core.Report`, which documents them."""

    sites: tuple[SiteReport, ...]
    failures: tuple[str, ...] = ()
    unavailable: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)
    device: str = ""
    order: tuple[str, ...] = ()
    origin: str = "compiled"
    compiled_at: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    merges: tuple[Merge, ...] = ()
    disagreements: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)
    tables: Mapping[str, str] = field(default_factory=dict)
    untuned: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)

    @property
    def fused(self) -> tuple[SiteReport, ...]:
        """The sites for which a strategy was chosen."""
        return tuple(site for site in self.sites if site.strategy is not None)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The outcome of each site, as far as it has run. A merged site without a kernel counts as merged."""
        merged = {(merge.graph, merge.nodes[-1]) for merge in self.merges if not merge.reasons}
        return tuple(
            Outcome.MERGED if (site.graph, site.node) in merged and site.outcome is not Outcome.KERNEL else site.outcome
            for site in self.sites
        )

    @property
    def changed(self) -> tuple[SiteReport, ...]:
        """The sites that run differently than without the pass."""
        unlike = (Outcome.KERNEL, Outcome.MERGED)
        return tuple(site for site, outcome in zip(self.sites, self.outcomes, strict=True) if outcome in unlike)


def site_attributes(site: Site) -> dict[str, Any]:
    """A site's attributes, as reports contain them."""
    return {
        **site.attributes,
        "inputs": {name: str(meta) for name, meta in site.inputs.items()},
        "live": {name: str(meta) for name, meta in site.outputs.items()},
        "group": site.group,
        "world_size": site.world_size,
    }
