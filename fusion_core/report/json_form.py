"""A report to plain JSON types and back. Data that sites share is written once: most layers of a model are equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fusion_core.decision import Choice, Decision, NearMiss, Timing
from fusion_core.reason import Reason, Stage
from fusion_core.report.record import SCHEMA, Merge, Record, SiteReport
from fusion_core.site import dtype_name


class _Table:
    """Values by index, in the order of their first lookup."""

    def __init__(self) -> None:
        self.places: dict[Any, int] = {}

    def place(self, value: Any) -> int:
        """The value's index."""
        return self.places.setdefault(value, len(self.places))


class _Shared:
    """Data that sites share."""

    def __init__(self) -> None:
        self.reasons, self.lists = _Table(), _Table()
        self._known: dict[int, tuple[int, list[int]]] = {}

    def place(self, decisions: tuple[Decision, ...]) -> tuple[int, list[int]]:
        """The index of a list of decisions, and the indices of its reasons."""
        if id(decisions) not in self._known:  # equal sites of a compiled graph have one list among them
            own = _Table()
            plain = tuple(
                (d.pattern, d.strategy, d.stage.name, tuple(own.place(self.reasons.place(why)) for why in d.reasons))
                for d in decisions
            )
            self._known[id(decisions)] = self.lists.place(plain), list(own.places)
        return self._known[id(decisions)]


def to_dict(report: Record) -> dict[str, Any]:
    """The report as plain JSON types."""
    shared = _Shared()
    sites = [_site(site, shared) for site in report.sites]
    return {
        "schema": SCHEMA,
        "origin": report.origin,
        "compiled_at": report.compiled_at,
        "versions": dict(report.versions),
        "device": report.device,
        "order": list(report.order),
        "failures": list(report.failures),
        "unavailable": _said(report.unavailable),
        "disagreements": _said(report.disagreements),
        "tables": dict(report.tables),
        "untuned": _said(report.untuned),
        "merges": [
            {"nodes": list(merge.nodes), "reasons": _plain_reasons(merge.reasons), "graph": merge.graph}
            for merge in report.merges
        ],
        "outcomes": [str(outcome) for outcome in report.outcomes],
        "sites": sites,
        "reasons": _plain_reasons(shared.reasons.places),
        "decisions": [
            [
                {"pattern": pattern, "strategy": strategy, "stage": stage, "reasons": list(places)}
                for pattern, strategy, stage, places in decisions
            ]
            for decisions in shared.lists.places
        ],
    }


def _site(site: SiteReport, shared: _Shared) -> dict[str, Any]:
    decisions, own = shared.place(site.decisions)
    return {
        "pattern": site.pattern,
        "strategy": site.strategy,
        "is_definition": site.is_definition,
        "node": site.node,
        "graph": site.graph,
        "collective": site.collective,
        "attributes": _plain(site.attributes),
        "near_misses": [{"pattern": miss.pattern, "reason": miss.reason.to_dict()} for miss in site.near_misses],
        "decisions": decisions,
        "reasons": own,
        "choices": [
            {
                "first": choice.first,
                "strategy": choice.strategy,
                "timing": None if choice.timing is None else dataclasses.asdict(choice.timing),
                "asks": list(choice.asks),
            }
            for choice in site.choices
        ],
        "run_time": _plain_reasons(site.run_time),
    }


def fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a report from `to_dict`'s result.

    Raises:
        ValueError: The data has another version's schema.
    """
    if data.get("schema") != SCHEMA:
        raise ValueError(f"the report has schema {data.get('schema')!r}, needs {SCHEMA}")
    known = _reasons(data["reasons"])
    shared: dict[tuple[int, tuple[int, ...]], tuple[Decision, ...]] = {}

    def decisions(site: Mapping[str, Any]) -> tuple[Decision, ...]:
        key = site["decisions"], tuple(site["reasons"])
        if key not in shared:
            own = [known[place] for place in key[1]]
            shared[key] = tuple(
                Decision(d["pattern"], d["strategy"], Stage[d["stage"]], tuple(own[place] for place in d["reasons"]))
                for d in data["decisions"][key[0]]
            )
        return shared[key]

    return {
        "sites": tuple(_read_site(site, decisions(site)) for site in data["sites"]),
        "failures": tuple(data["failures"]),
        "unavailable": _heard(data["unavailable"]),
        "device": data["device"],
        "order": tuple(data["order"]),
        "origin": data["origin"],
        "compiled_at": data["compiled_at"],
        "versions": data["versions"],
        "merges": tuple(
            Merge(tuple(merge["nodes"]), _reasons(merge["reasons"]), merge["graph"]) for merge in data["merges"]
        ),
        "disagreements": _heard(data["disagreements"]),
        "tables": data["tables"],
        "untuned": _heard(data["untuned"]),
    }


def _read_site(site: Mapping[str, Any], decisions: tuple[Decision, ...]) -> SiteReport:
    return SiteReport(
        site["pattern"],
        site["strategy"],
        site["node"],
        site["attributes"],
        decisions,
        tuple(
            Choice(
                c["first"],
                c["strategy"],
                None if c["timing"] is None else Timing(**c["timing"]),
                tuple(c.get("asks", ())),
            )
            for c in site["choices"]
        ),
        tuple(NearMiss(miss["pattern"], Reason(**miss["reason"])) for miss in site["near_misses"]),
        site["is_definition"],
        site["graph"],
        site.get("collective", "all_reduce"),
    )


def _plain_reasons(reasons: Iterable[Reason]) -> list[dict[str, Any]]:
    return [reason.to_dict() for reason in reasons]


def _reasons(items: Iterable[Mapping[str, Any]]) -> tuple[Reason, ...]:
    return tuple(Reason(**item) for item in items)


def _said(by_name: Mapping[str, Iterable[Reason]]) -> dict[str, list[dict[str, Any]]]:
    return {name: _plain_reasons(reasons) for name, reasons in by_name.items()}


def _heard(by_name: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, tuple[Reason, ...]]:
    return {name: _reasons(items) for name, items in by_name.items()}


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
