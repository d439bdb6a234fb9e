"""What stands at each all_reduce: as the rewritten graph has it, and as a report names it.

Each node of a strategy says whose it is, and of which all_reduce.
"""

from __future__ import annotations

from torch import fx

from fusion_core import Report
from fusion_core.emit.pairing import PROVENANCE, SITE

Placed = list[tuple[str, str | None]]
"""The all_reduces of a row with the strategy at each."""


def placed(graph: fx.Graph, report: Report) -> Placed:
    """What a rewritten graph has where each all_reduce of its report was."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        if PROVENANCE in node.meta:
            found.setdefault(node.meta[SITE], set()).add(node.meta[PROVENANCE])
    assert all(len(strategies) == 1 for strategies in found.values()), found
    assert set(found) <= {site.node for site in report.sites}
    return [(site.node, next(iter(found.get(site.node, {None})))) for site in report.sites]


def named(report: Report) -> Placed:
    """What a report says of each all_reduce."""
    return [(site.node, site.strategy) for site in report.sites]
