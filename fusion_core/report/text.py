"""A report as text: a line per site, then what happened at run time, what was refused and why, what is not usable."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fusion_core.decision import Choice, Decision
from fusion_core.reason import Stage
from fusion_core.report.record import Outcome, Record, SiteReport
from fusion_core.site import dtype_name

_ORIGINS = {
    "compiled": "",
    "explained": "dry run: nothing was changed; ",
    "cache": "from the compile cache, as recorded when it was compiled at {compiled_at}; ",
}
_REFUSED = (Stage.REQUIRES, Stage.WORTHWHILE, Stage.REPLACEMENT, Stage.OUTRANKED)
_FLAGS = {"weight_bias": 0.0}
"""Attributes that are shown only if they differ from this value, or from None and False."""
_UNSAID = ("inputs", "live", "group", "world_size", "weight_after_cast")
"""Attributes that the line shows in another form, or that most models have."""


def text(report: Record) -> str:
    """The report as text, without a trailing newline."""
    return "\n".join(_lines(report))


def headline(report: Record) -> str:
    """The outcome for the graph in one line, changes first."""
    origin = _ORIGINS[report.origin].format(compiled_at=report.compiled_at)
    if report.origin == "cache" and not report.compiled_at:
        return (
            "fusion_core: this graph came from the compile cache, and its report was not kept; clear the cache, or "
            "compile with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1, to see it"
        )
    if not report.sites:
        return f"fusion_core: {origin}no all_reduce in this graph on {report.device}, nothing to fuse"
    counts = ", ".join(_counts(report))
    graphs = len({site.graph for site in report.sites})
    where = f", in {graphs} graphs" if graphs > 1 else ""
    return f"fusion_core: {origin}{counts}{where}, on {_ranks(report)}{report.device}"


def _counts(report: Record) -> Iterator[str]:
    """The number of sites per outcome: those on a kernel first, then every other outcome that occurs."""
    outcomes = Counter(report.outcomes)
    verb = "would be on a kernel" if report.origin == "explained" else "on a kernel"
    reduces = all(site.collective == "all_reduce" for site in report.sites)
    yield f"{outcomes[Outcome.KERNEL]} of {len(report.sites)} {'all_reduces' if reduces else 'collectives'} {verb}"
    for outcome in (Outcome.MERGED, Outcome.AS_BEFORE, Outcome.RAN_UNFUSED, Outcome.REFUSED):
        if not outcomes[outcome]:
            continue
        more = ""
        if outcome is Outcome.MERGED:
            more = f" (of {sum(len(merge.nodes) for merge in report.merges if not merge.reasons)})"
        elif outcome is Outcome.AS_BEFORE:
            names = {str(site.strategy).partition(".")[0] for site in report.sites if site.is_definition}
            more = f" ({', '.join(sorted(names))})"
        yield f"{outcomes[outcome]} {outcome}{more}"


def _ranks(report: Record) -> str:
    """The number of ranks, if it is the same at all sites."""
    sizes = {site.attributes.get("world_size") for site in report.sites}
    return f"{sizes.pop()} x " if len(sizes) == 1 and None not in sizes else ""


def _lines(report: Record) -> Iterator[str]:
    yield headline(report)
    if report.sites:
        yield ""
        yield from _table([_site_row(site, not _ranks(report)) for site in report.sites])
    if lines := list(_grouped(report.sites, by_size)):
        yield ""
        yield "by size:"
        yield from lines
    if lines := list(tables(report)):
        yield ""
        yield "tuning table:"
        yield from lines
    if lines := list(merges(report)):
        yield ""
        yield "merged:"
        yield from lines
    for title, lines_of in (("at run time:", _at_run_time), ("refused:", _worth_saying)):
        if lines := list(_grouped(report.sites, lines_of)):
            yield ""
            yield title
            yield from lines
    not_usable = [f"  {name}: {'; '.join(map(str, reasons))}" for name, reasons in report.unavailable.items()]
    if not_usable or report.failures:
        yield ""
        yield "not usable here:"
        yield from not_usable
        yield from (f"  {failure}" for failure in report.failures)
    if lines := list(disagreements(report)):
        yield ""
        yield "ranks differ:"
        yield from lines
    if report.sites and not report.order:
        yield ""
        yield "no backend is in use (order is empty, or none loads)"


def merges(report: Record) -> Iterator[str]:
    """The outcome for all_reduces whose results are added together, a line each."""
    for merge in report.merges:
        where = f"graph {merge.graph}: " if merge.graph else ""
        *others, last = merge.nodes
        if merge.reasons:
            why = "; ".join(map(str, merge.reasons))
            yield f"  {where}{' + '.join(merge.nodes)} [stay {len(merge.nodes)}]: {why}"
        else:
            yield f"  {where}{' + '.join(others)} into {last}: one all_reduce of the sum"


def by_size(site: SiteReport) -> Iterator[tuple[str, str]]:
    """The strategies by token count and their measured times, as subject and text."""
    if len(site.choices) == 1 and (timing := site.choices[0].timing) is not None:
        yield str(site.strategy), str(timing)
    elif len(site.choices) > 1:
        ranges = [
            f"from {first}: {', else '.join(map(_said, of_it))}"
            for first, of_it in itertools.groupby(site.choices, lambda choice: choice.first)
        ]
        yield site.pattern, "; ".join(["by the tokens of each call", *ranges])


def _said(choice: Choice) -> str:
    measured = "" if choice.timing is None else f" ({choice.timing})"
    asked = f" in a call with {' and '.join(choice.asks)}" if choice.asks else ""
    return f"{choice.strategy or 'unfused'}{asked}{measured}"


def tables(report: Record) -> Iterator[str]:
    """The tuning tables that were used, or the reasons why none was, a line each."""
    yield from (f"  {line}" for line in dict.fromkeys(report.tables.values()))
    yield from (f"  {line}" for line in dict.fromkeys(str(each) for why in report.untuned.values() for each in why))


def disagreements(report: Record) -> Iterator[str]:
    """What differs between the ranks of process groups, a line each."""
    for group, reasons in report.disagreements.items():
        where = f" (process group {group})" if len(report.disagreements) > 1 else ""
        yield from (f"  {reason}{where}" for reason in reasons)


def _site_row(site: SiteReport, with_ranks: bool) -> tuple[str, ...]:
    ranks = f", world size {site.attributes['world_size']}" if with_ranks and site.attributes else ""
    chosen = f"-> {site.strategy}" if site.strategy else "refused"
    return site.label, site.pattern, chosen, facts(site.attributes) + ranks


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def facts(attributes: Mapping[str, Any]) -> str:
    """A site's attributes in one line."""
    if not attributes:
        return ""
    words = [f"x {attributes['inputs']['x']}"]
    for name, value in attributes.items():
        if name in _UNSAID or value is None or value is False or _FLAGS.get(name) == value:
            continue
        if value is True:
            words.append(name)
        else:
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {_value(value)}")
    words.append(f"live {' + '.join(attributes['live']) or 'nothing'}")
    return ", ".join(words)


def _value(value: Any) -> str:
    return dtype_name(value) if type(value).__name__ == "dtype" else str(value)


def _grouped(sites: Iterable[SiteReport], lines_of: Callable[[SiteReport], Iterator[tuple[str, str]]]) -> Iterator[str]:
    """The lines of several sites, each a subject and a reason; equal lines become one that names their sites."""
    where: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        for subject, why in dict.fromkeys(lines_of(site)):
            where.setdefault((subject, why), []).append(site.label)
    for (subject, why), nodes in where.items():
        places = ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")
        yield f"  {subject}: {why} (at {places})"


def _at_run_time(site: SiteReport) -> Iterator[tuple[str, str]]:
    for name, reason in site.fallen_back:
        yield f"{name} runs unfused", str(reason)


def _worth_saying(site: SiteReport) -> Iterator[tuple[str, str]]:
    """Refusals that explain something."""
    for miss in site.near_misses:
        yield miss.pattern, str(miss.reason)
    printed: list[tuple[str, str, frozenset[str]]] = []
    for decision in site.decisions:
        if decision.stage is Stage.OPTION:  # once for all strategies that need the option
            yield "option", "; ".join(map(str, decision.reasons))
        elif decision.stage in _REFUSED and _is_rival(site, decision):
            backend, reasons = (decision.strategy or "").partition(".")[0], frozenset(map(str, decision.reasons))
            if any((backend, decision.pattern) == each[:2] and each[2] <= reasons for each in printed):
                continue  # a variant that is refused for all the reasons of one printed before
            printed.append((backend, decision.pattern, reasons))
            yield f"{decision.strategy} [{decision.stage.name.lower()}]", "; ".join(map(str, decision.reasons))


def _is_rival(site: SiteReport, decision: Decision) -> bool:
    """Whether a user might have expected the strategy to run: not the chosen backend's own shorter patterns."""
    chosen = (site.strategy or "").partition(".")[0]
    return decision.stage is not Stage.OUTRANKED or (decision.strategy or "").partition(".")[0] != chosen
