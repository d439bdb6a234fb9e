"""Every decision about one graph, as values, as text, as JSON and as a page."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from fusion_core.decide import Choice, Decision
from fusion_core.nearest import NearMiss
from fusion_core.reason import Reason
from fusion_core.run_time import fallen_back
from fusion_core.site import Site

SCHEMA = 2
"""Version of `Report.to_dict`'s form; it changes where a reader of the old form would be misled."""


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


@dataclass(frozen=True)
class Report:
    """Every decision about one graph.

    Attributes:
        sites: One for each all_reduce of the graph, fused or not, in graph order.
        failures: Backends that failed to load, as text.
        unavailable: Backends that cannot be used on this device → why.
        device: The device that the decisions were made for.
        order: The backends that were asked, best first.
        origin: ``"compiled"``, ``"explained"`` (a dry run), or ``"cache"``: the graph came from the compile cache and
            the pass did not run; this is what it recorded when the graph was compiled.
        compiled_at: When the pass ran, as an ISO time in UTC.
        versions: Of torch and fusion_core at that time.
        merges: All_reduces whose results are added together: made one, or why not.
        disagreements: Process groups whose ranks differ → in what, and what is not used there for it.
        tables: Process groups → where the tuning table comes from that decided there.
        untuned: Process groups on GPUs where none did, though the user wants one → why.
    """

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

    def __str__(self) -> str:
        from fusion_core.report_text import text

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; `from_dict` takes back all but ``run_time``, which is a process's own.

        What many sites share is there once: ``reasons`` holds every reason and ``decisions`` every list of decisions.
        A site's ``decisions`` is the place of its list, whose reasons are places in the site's own ``reasons``, which
        are places in the report's.
        """
        from fusion_core.report_json import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` gave.

        Raises:
            ValueError: where the form is another version's.
        """
        from fusion_core.report_json import from_dict

        return from_dict(data)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one self-contained HTML page; an existing file is replaced as a whole."""
        from fusion_core.report_html import page

        write_whole(Path(path), page(self))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new one, and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def site_attributes(site: Site) -> dict[str, Any]:
    """A site's facts as a report shows them."""
    return {
        **site.attributes,
        "inputs": {name: str(meta) for name, meta in site.inputs.items()},
        "live": {name: str(meta) for name, meta in site.outputs.items()},
        "group": site.group,
        "world_size": site.world_size,
    }
