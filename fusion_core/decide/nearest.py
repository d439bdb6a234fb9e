"""The near misses at one all_reduce: patterns that nearly match, each with the cause that got furthest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusion_core.decide.candidate import PatternOutcome
from fusion_core.decision import NearMiss
from fusion_core.reason import Reason
from fusion_core.site import Site

_OF_IT = " of it"


_SUMS = (("all_reduce",), ("all_reduce", "add_bias"))
"""The words of patterns that other patterns may continue: a norm may follow."""
ORDINARY = frozenset({"structure", "graph_end", "graph_break"})
"""Codes of reasons that only report the end of a chain. Every chain ends, so this is not a near miss."""


def nearest(outcomes: Sequence[PatternOutcome]) -> tuple[list[PatternOutcome], tuple[NearMiss, ...]]:
    """The near misses among patterns at one all_reduce, and the patterns without uninformative reasons.

    If a pattern matches, only longer patterns can be near misses, as far as they match beyond it: another branch behind
    the all_reduce is none. If only the bare all_reduce matches, or that with a bias, whatever follows it is the reason.
    """
    whole = next((each.pattern for each in outcomes if isinstance(each.site, Site)), None)
    least = 0 if whole is None else 1 if whole.words in _SUMS else len(whole.steps)
    longer: list[tuple[PatternOutcome, Reason]] = []
    found: list[PatternOutcome] = []
    for each in outcomes:
        if isinstance(each.site, Reason):
            if len(each.pattern.steps) > least:
                if each.depth >= least or least == 1:
                    longer.append((each, each.site))
            elif whole is not None:
                each = replace(each, site=Reason("structure", f"{whole.name} stands here"))
        found.append(each)
    telling = [(each, why) for each, why in longer if why.code not in ORDINARY]
    if whole is None or least == 1:
        deepest = max((each.depth for each, _ in longer), default=0)
        longer = [(each, why) for each, why in longer if each.depth == deepest]
        telling = [pair for pair in telling if pair in longer] or _together(longer)
    # the last pattern of each reason is the shortest
    shortest = {str(why): NearMiss(each.pattern.name, why) for each, why in telling}
    return found, tuple(shortest.values())


def _together(misses: list[tuple[PatternOutcome, Reason]]) -> list[tuple[PatternOutcome, Reason]]:
    """Merge the needs of misses that found the same: any one of them would do."""
    words: dict[str, dict[str, None]] = {}
    for _, why in misses:
        words.setdefault(why.found, {})[why.needs.removesuffix(_OF_IT)] = None
    needs = {found: _any_of(sorted(each)) + _OF_IT for found, each in words.items()}
    return [(each, replace(why, needs=needs[why.found]) if why.needs else why) for each, why in misses]


def _any_of(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
