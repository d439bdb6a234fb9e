"""A report as one self-contained HTML page: no script, no network. The template is ``page.html.jinja``."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import resources
from typing import TYPE_CHECKING, Any

from fusion_core.reason import Stage
from fusion_core.report.record import Record, SiteReport
from fusion_core.report.text import disagreements, facts, headline, merges, tables

if TYPE_CHECKING:
    from jinja2 import Template


def page(report: Record) -> str:
    """The report as HTML: a line per site that expands to every strategy that was considered and its reasons."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    unusable = [f"{name}: {'; '.join(map(str, reasons))}" for name, reasons in report.unavailable.items()]
    return _template().render(
        title=headline(report),
        made=f"{versions}; {report.compiled_at}; order: {', '.join(report.order) or 'no backend'}",
        disagreements=_items(disagreements(report)),
        tables=_items(tables(report)),
        merges=_items(merges(report)),
        sites=map(_site, report.sites),
        unusable=[*unusable, *report.failures],
    )


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined  # here, and not whenever fusion_core is imported

    source = resources.files("fusion_core.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)


def _items(lines: Iterable[str]) -> list[str]:
    return [line.strip() for line in lines]


def _site(site: SiteReport) -> dict[str, Any]:
    state, chosen = ("fused", site.strategy) if site.strategy else ("unfused", "refused")
    if site.run_time:
        state, chosen = "unfused", f"{site.strategy} runs unfused"
    elif site.is_definition:
        state, chosen = "quiet", f"{site.strategy}, as before"
    decisions = [decision for decision in site.decisions if decision.stage is not Stage.UNAVAILABLE]
    return {
        "label": site.label,
        "pattern": site.pattern,
        "state": state,
        "chosen": chosen,
        "attributes": facts(site.attributes),
        "notes": [
            *(f"at run time: {reason}" for reason in site.run_time),
            *(f"near miss: {miss.pattern}: {miss.reason}" for miss in site.near_misses),
        ],
        "decisions": sorted(decisions, key=lambda decision: -decision.stage),
    }
