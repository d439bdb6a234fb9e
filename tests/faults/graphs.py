"""Ranks that run different graphs: rank 1 is the one that differs."""

from __future__ import annotations

from typing import Any

from fusion_core.workers import WorkerPool
from tests import kernel_calls_jobs as jobs
from tests.faults.fault import Fault

FIXTURES = ("two_ranks",)
EXACT = 1e-4


def observe(job: str, two_ranks: WorkerPool, arguments: tuple[Any, ...] = ()) -> str:
    """Run a job on two ranks: are the numbers right, which calls ran kernels, and which ranks report why not."""
    found = two_ranks.run(getattr(jobs, job), *arguments)
    if any(error > EXACT for each in found for error in each.errors):
        return "wrong numbers"
    if raised := [f"rank {rank}" for rank, each in enumerate(found) if each.raised]:
        return f"error: RanksDiffer on {', '.join(raised)}"
    if all(all(each.ran) for each in found):
        return "right"
    kernels = [sum(map(bool, each.ran)) for each in found]
    if len(set(kernels)) > 1:
        return f"kernels on some ranks alone: {kernels}"
    said = [f"rank {rank}" for rank, each in enumerate(found) if each.warned or each.run_time or each.refused]
    return f"unfused{' later' if kernels[0] else ''}: said by {', '.join(said) or 'nobody'}"


BOTH, FIRST = "unfused: said by rank 0, rank 1", "unfused: said by rank 0"


def _row(name: str, fault: str, expected: str, job: str, *arguments: Any, slow: bool = False) -> Fault:
    return Fault("graphs", name, fault, expected, {"job": job, "arguments": arguments}, slow)


def _differs(how: str, fault: str, expected: str, slow: bool = False) -> Fault:
    return _row(how, fault, expected, "differing", how, slow=slow)


ROWS = (
    _row("none", "both ranks run one graph", "right", "alike", False, False),
    _row("none, whole", "both ranks run one graph through all of Inductor", "right", "alike", True, False, slow=True),
    _row("none, dynamic", "both ranks run one graph of dynamic sizes", "right", "alike", False, True),
    _differs("a graph break", "the graph breaks between two all_reduces on rank 1", BOTH, slow=True),
    _differs("a break in front", "the graph breaks before the first all_reduce on rank 1", "right"),
    _differs("a break behind", "the graph breaks behind the last all_reduce on rank 1", "right"),
    _differs("breaks everywhere", "the graph breaks at each step on rank 1", FIRST),
    _differs("dynamic sizes", "rank 1 compiles for dynamic sizes, rank 0 for fixed ones", BOTH),
    _differs("a requirement", "a requirement is not met on rank 1", FIRST, slow=True),
    _differs("a trace that fails", "the impl raises while it is traced on rank 1", FIRST, slow=True),
    _differs("a fake that fails", "the operator's fake raises on rank 1", FIRST, slow=True),
    _differs("an order", "rank 1 is configured for other backends", BOTH),
    _differs("a limit", "rank 1 is configured for one rewrite", BOTH, slow=True),
    _differs("suppressed errors", "rank 1's compilation fails and Dynamo goes on eagerly", FIRST, slow=True),
    _differs("eager", "rank 1 does not compile at all", BOTH.replace(", rank 1", ""), slow=True),
    _row("another graph later", "both agree on one graph, then rank 1's next graph breaks", "unfused later: said by rank 0, rank 1", "both_take_other_graphs", True),
    _row("a second graph", "both agree on one graph, then on a second one", "right", "both_take_other_graphs", False),
    _row("another graph on one rank", "rank 1 leaves a graph that was agreed on", "error: RanksDiffer on rank 1", "one_takes_another_graph"),
    _row("another configuration later", "rank 1 alone is configured anew", "error: RanksDiffer on rank 1", "one_is_configured_anew"),
    _row("Ctrl-C while it waits", "rank 1 is interrupted at the agreement and tries again", "right", "interrupted", 1),
    _row("Ctrl-C three times", "rank 1 is interrupted three times", "right", "interrupted", 3, slow=True),
    _row("eager function", "the eager function of the pattern", "right", "by_hand", False),
    _row("eager function, another strategy", "rank 1 chooses another strategy for the eager function", FIRST, "by_hand", True, slow=True),
    _row("side by side", "two all_reduces that are added, plain Inductor's order", "right", "side_by_side", False, slow=True),
    _row("side by side, a break", "the graph breaks between them on rank 1", "right", "side_by_side", True, slow=True),
)  # fmt: skip
