"""Every decision about one graph, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fusion_core.decision import Choice, Decision, NearMiss
from fusion_core.reason import Reason
from fusion_core.run_time import fallen_back
from fusion_core.site import Site

SCHEMA = 2
"""Version of the JSON form; it changes where a reader of the old form would be misled."""


class Outcome(StrEnum):
    """What became of one all_reduce."""

    KERNEL = "on a kernel"
    """Something else runs there than what the model had."""
    MERGED = "merged"
    """It takes the place of several; its sum is the model's own."""
    AS_BEFORE = "as before"
    """It is recognised, and the best that is known for it is what the model had."""
    RAN_UNFUSED = "unfused at run time"
    """A kernel was chosen that could not run, so that torch's all_reduce runs in its place."""
    REFUSED = "refused"
    """Nothing was chosen for it."""


@dataclass(frozen=True)
class SiteReport:
    """What was decided at one all_reduce.

    Attributes:
        pattern: The pattern that is fused there; where nothing is, the longest one that stands there, or
            ``"all_reduce"``.
        strategy: ``"backend.name"``, or None where nothing is fused.
        node: A label of the all_reduce.
        attributes: The pattern's scalars (``eps``, ``weight_bias``, ...), its tensors as text under ``inputs``, the
            names of its live outputs under ``live``, the ``group`` and the ``world_size``.
        decisions: For every strategy of every pattern, how far it got and why no further.
        choices: What runs from which token count on, with the figures where it was measured: one for a site of fixed
            size, and several where an operator picks by the count when it runs. Empty where nothing was measured.
        near_misses: What nearly makes a longer pattern of it, and why it is none; where no more than the all_reduce
            stands, what follows that instead.
        is_definition: Whether the strategy is the pattern's own definition, which Inductor compiles as it compiles
            what the model had there.
        graph: The graph's number in a report of several, from 1; 0 in a report of one.
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

    @property
    def label(self) -> str:
        """What tells it from every other site of its report."""
        return f"graph {self.graph}: {self.node}" if self.graph else self.node

    @property
    def outcome(self) -> Outcome:
        """What became of it; looked up anew each time, as its calls come later."""
        if self.strategy is None:
            return Outcome.REFUSED
        if self.is_definition:
            return Outcome.AS_BEFORE
        return Outcome.RAN_UNFUSED if self.run_time else Outcome.KERNEL

    @property
    def run_time(self) -> tuple[Reason, ...]:
        """Why it runs unfused in this process all the same; looked up anew each time, as calls come later."""
        return tuple(dict.fromkeys(reason for _, reason in self.fallen_back))

    @property
    def fallen_back(self) -> tuple[tuple[str, Reason], ...]:
        """Each strategy that runs there, at some token count at least, and that runs unfused all the same → why."""
        names = dict.fromkeys(name for name in (self.strategy, *(c.strategy for c in self.choices)) if name is not None)
        group = self.attributes.get("group", "")
        return tuple((name, reason) for name in names for reason in fallen_back(name, group))


@dataclass(frozen=True)
class Merge:
    """All_reduces whose results are added together.

    Attributes:
        nodes: Their labels, in graph order.
        reasons: Why they stay as they are; empty where the last one now reduces the sum of all.
        graph: The graph's number in a report of several, from 1; 0 in a report of one.
    """

    nodes: tuple[str, ...]
    reasons: tuple[Reason, ...] = ()
    graph: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """The fields of a `fusion_core.Report`, which says what each of them is."""

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
        """The sites that a strategy was chosen for."""
        return tuple(site for site in self.sites if site.strategy is not None)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of each site, as far as it has run; a merged one counts as changed on no kernel too."""
        merged = {(merge.graph, merge.nodes[-1]) for merge in self.merges if not merge.reasons}
        return tuple(
            Outcome.MERGED if (site.graph, site.node) in merged and site.outcome is not Outcome.KERNEL else site.outcome
            for site in self.sites
        )

    @property
    def changed(self) -> tuple[SiteReport, ...]:
        """The sites at which something else runs than without the pass."""
        unlike = (Outcome.KERNEL, Outcome.MERGED)
        return tuple(site for site, outcome in zip(self.sites, self.outcomes, strict=True) if outcome in unlike)


def site_attributes(site: Site) -> dict[str, Any]:
    """A site's facts as a report shows them."""
    return {
        **site.attributes,
        "inputs": {name: str(meta) for name, meta in site.inputs.items()},
        "live": {name: str(meta) for name, meta in site.outputs.items()},
        "group": site.group,
        "world_size": site.world_size,
    }
