"""Every decision about one graph, as values, as text, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusion_core.decide import Choice, Decision
from fusion_core.figures import Figure
from fusion_core.reason import Reason, Stage
from fusion_core.run_time import fallen_back
from fusion_core.site import Site, dtype_name

SCHEMA = 1
"""Version of `Report.to_dict`'s form; it changes where a reader of the old form would be misled."""


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
    """

    pattern: str
    strategy: str | None
    node: str
    attributes: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    choices: tuple[Choice, ...] = ()

    @property
    def run_time(self) -> tuple[Reason, ...]:
        """Why its strategy runs unfused in this process all the same; looked up anew each time, as calls come later."""
        return () if self.strategy is None else fallen_back(self.strategy, self.attributes.get("group", ""))


@dataclass(frozen=True)
class Merge:
    """All_reduces whose results are added together.

    Attributes:
        nodes: Their labels, in graph order.
        reasons: Why they stay as they are; empty where the last one now reduces the sum of all.
    """

    nodes: tuple[str, ...]
    reasons: tuple[Reason, ...] = ()


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

    def __str__(self) -> str:
        from fusion_core.report_text import text

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; `from_dict` takes back all but ``run_time``, which is a process's own."""
        return {
            "schema": SCHEMA,
            "origin": self.origin,
            "compiled_at": self.compiled_at,
            "versions": dict(self.versions),
            "device": self.device,
            "order": list(self.order),
            "failures": list(self.failures),
            "unavailable": {
                name: [reason.to_dict() for reason in reasons] for name, reasons in self.unavailable.items()
            },
            "disagreements": {
                group: [reason.to_dict() for reason in reasons] for group, reasons in self.disagreements.items()
            },
            "tables": dict(self.tables),
            "untuned": {group: [reason.to_dict() for reason in reasons] for group, reasons in self.untuned.items()},
            "merges": [
                {"nodes": list(merge.nodes), "reasons": [reason.to_dict() for reason in merge.reasons]}
                for merge in self.merges
            ],
            "sites": [
                {
                    "pattern": site.pattern,
                    "strategy": site.strategy,
                    "node": site.node,
                    "attributes": _plain(site.attributes),
                    "decisions": [
                        {
                            "pattern": decision.pattern,
                            "strategy": decision.strategy,
                            "stage": decision.stage.name,
                            "reasons": [reason.to_dict() for reason in decision.reasons],
                        }
                        for decision in site.decisions
                    ],
                    "choices": [
                        {
                            "first": choice.first,
                            "strategy": choice.strategy,
                            "figure": None if choice.figure is None else dataclasses.asdict(choice.figure),
                        }
                        for choice in site.choices
                    ],
                    "run_time": [reason.to_dict() for reason in site.run_time],
                }
                for site in self.sites
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` gave.

        Raises:
            ValueError: where the form is another version's.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"the report has schema {data.get('schema')!r}, needs {SCHEMA}")

        def reasons(items: list[dict[str, Any]]) -> tuple[Reason, ...]:
            return tuple(Reason(**item) for item in items)

        sites = tuple(
            SiteReport(
                site["pattern"],
                site["strategy"],
                site["node"],
                site["attributes"],
                tuple(
                    Decision(d["pattern"], d["strategy"], Stage[d["stage"]], reasons(d["reasons"]))
                    for d in site["decisions"]
                ),
                tuple(
                    Choice(c["first"], c["strategy"], None if c["figure"] is None else Figure(**c["figure"]))
                    for c in site.get("choices", ())
                ),
            )
            for site in data["sites"]
        )
        return cls(
            sites,
            tuple(data["failures"]),
            {name: reasons(items) for name, items in data["unavailable"].items()},
            data["device"],
            tuple(data["order"]),
            data["origin"],
            data["compiled_at"],
            data["versions"],
            tuple(Merge(tuple(merge["nodes"]), reasons(merge["reasons"])) for merge in data.get("merges", ())),
            {group: reasons(items) for group, items in data.get("disagreements", {}).items()},
            data.get("tables", {}),
            {group: reasons(items) for group, items in data.get("untuned", {}).items()},
        )

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


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
