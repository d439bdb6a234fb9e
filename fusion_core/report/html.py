"""A report as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fusion_core.reason import Stage
from fusion_core.report.record import Record, SiteReport
from fusion_core.report.text import disagreements, facts, headline, merges, tables

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
code { font: 13px ui-monospace, monospace; }
summary { cursor: pointer; padding: .3rem 0; }
.fused { color: #0a6b2b; } .unfused { color: #9a3412; } .quiet { color: #666; }
@media (prefers-color-scheme: dark) {
  body { background: #161616; color: #e4e4e4; } th, td { border-color: #3a3a3a; }
  .fused { color: #6fd08c; } .unfused { color: #f0a27a; } .quiet { color: #999; }
}
"""


def page(report: Record) -> str:
    """The report as HTML: a line a site, each opening on every strategy that was asked and its reasons."""
    title = escape(headline(report))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    made = escape(f"{versions}; {report.compiled_at}; order: {', '.join(report.order) or 'no backend'}")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        f'<p class="quiet">{made}</p>',
        _listed("Ranks differ", disagreements(report)),
        _listed("Tuning table", tables(report)),
        _listed("Merged", merges(report)),
        *map(_site, report.sites),
        _unusable(report),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _listed(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line.strip())}</li>" for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _site(site: SiteReport) -> str:
    state, chosen = ("fused", site.strategy) if site.strategy else ("unfused", "refused")
    if site.run_time:
        state, chosen = "unfused", f"{site.strategy} runs unfused"
    elif site.is_definition:
        state, chosen = "quiet", f"{site.strategy}, as before"
    said = [f"at run time: {reason}" for reason in site.run_time]
    said += [f"near miss: {miss.pattern}: {miss.reason}" for miss in site.near_misses]
    notes = "".join(f"<p>{escape(line)}</p>" for line in said)
    rows = "\n".join(
        f"<tr><td><code>{escape(d.strategy or '')}</code></td><td>{escape(d.pattern)}</td>"
        f"<td>{d.stage.name.lower()}</td><td>{escape('; '.join(map(str, d.reasons)))}</td></tr>"
        for d in sorted(site.decisions, key=lambda decision: -decision.stage)
        if d.stage is not Stage.UNAVAILABLE
    )
    return (
        f'<details><summary><code>{escape(site.label)}</code> {escape(site.pattern)} <b class="{state}">'
        f'{escape(str(chosen))}</b> <span class="quiet">{escape(facts(site.attributes))}</span></summary>'
        f"{notes}<table><tr><th>strategy</th><th>pattern</th><th>stage</th><th>why</th></tr>{rows}</table></details>"
    )


def _unusable(report: Record) -> str:
    lines = [f"{name}: {'; '.join(map(str, reasons))}" for name, reasons in report.unavailable.items()]
    lines += report.failures
    return _listed("Not usable here", lines)
