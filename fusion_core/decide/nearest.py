"""Which patterns nearly stand at one all_reduce: the nearest cause, and nothing that is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusion_core.decide.candidate import Standing
from fusion_core.decision import NearMiss
from fusion_core.reason import Reason
from fusion_core.site import Site

_OF_IT = " of it"


ORDINARY = frozenset({"structure", "graph_end", "graph_break"})
"""Codes of reasons that say no more than that a chain is at its end: most are, so that this is no near miss."""


def nearest(standings: Sequence[Standing]) -> tuple[list[Standing], tuple[NearMiss, ...]]:
    """The near misses among patterns at one all_reduce, and the patterns without reasons that say nothing.

    Where a pattern stands, those that are no longer are no near misses: one of them stands in their place. Where no
    more than the all_reduce stands, what follows it there is the reason, whatever it is.
    """
    whole = next((each.pattern for each in standings if isinstance(each.site, Site)), None)
    least = 0 if whole is None else len(whole.steps)
    longer: list[tuple[Standing, Reason]] = []
    found: list[Standing] = []
    for each in standings:
        if isinstance(each.site, Reason):
            if len(each.pattern.steps) > least:
                longer.append((each, each.site))
            elif whole is not None:
                each = replace(each, site=Reason("structure", f"{whole.name} stands here"))
        found.append(each)
    telling = [(each, why) for each, why in longer if why.code not in ORDINARY]
    if whole is None or least == 1:
        deepest = max((each.depth for each, _ in longer), default=0)
        longer = [(each, why) for each, why in longer if each.depth == deepest]
        telling = [pair for pair in telling if pair in longer] or _together(longer)
    shortest = {str(why): NearMiss(each.pattern.name, why) for each, why in telling}  # the last of each is the shortest
    return found, tuple(shortest.values())


def _together(misses: list[tuple[Standing, Reason]]) -> list[tuple[Standing, Reason]]:
    """Of misses that found the same, one that needs any of what they need."""
    words: dict[str, dict[str, None]] = {}
    for _, why in misses:
        words.setdefault(why.found, {})[why.needs.removesuffix(_OF_IT)] = None
    needs = {found: " or ".join(each) + _OF_IT for found, each in words.items()}
    return [(each, replace(why, needs=needs[why.found]) if why.needs else why) for each, why in misses]
