"""What each worker's graphs became."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fusion_core import FusionError, Report, reports

METHOD = "fusion_core_reports"
"""The method that `hooks` adds to vLLM's workers."""


@dataclass(frozen=True)
class WorkerReports:
    """The reports of one worker.

    Attributes:
        rank: The worker's rank in its engine.
        reports: One for each graph with sites that it compiled, oldest first; of graphs that all came from vLLM's cache
            those that were kept when they were compiled.
        graphs: For each report, how many of the model's graphs it is about: vLLM compiles equal ones once.
    """

    rank: int
    reports: tuple[Report, ...]
    graphs: tuple[int, ...]

    def __str__(self) -> str:
        found = []
        for report, count in zip(self.reports, self.graphs, strict=True):
            equal = f", {count} equal graphs, each" if count > 1 else ""
            found.append(f"rank {self.rank}{equal}: {report}")
        return "\n\n".join(found) or f"rank {self.rank}: no site"


def of_worker(worker: Any) -> str:
    """The reports of this process as JSON, since vLLM sends values of few types between processes."""
    from fusion_vllm import kept
    from fusion_vllm.equal_graphs import count_of

    own = [(each.to_dict(), count_of(each)) for each in reports() if each.sites]
    return json.dumps({"rank": worker.rank, "reports": own or kept.load(worker.vllm_config)}, default=str)


def report(llm: Any) -> list[WorkerReports]:
    """What each worker's graphs became.

    Args:
        llm: A ``vllm.LLM``, made with ``additional_config={"fusion_core": {...}}``.

    Returns:
        One for each worker, in the order of their ranks.

    Raises:
        FusionError: fusion is not switched on in this engine.
    """
    from fusion_vllm.settings import NAME, given_in

    if given_in(llm.llm_engine.vllm_config) is None:
        raise FusionError(
            f"additional_config has no {NAME!r}, needs it: vllm.LLM(..., additional_config={{{NAME!r}: {{}}}})"
        )
    found = sorted(map(json.loads, llm.collective_rpc(METHOD)), key=lambda each: int(each["rank"]))
    return [
        WorkerReports(
            each["rank"],
            tuple(Report.from_dict(report) for report, _ in each["reports"]),
            tuple(count for _, count in each["reports"]),
        )
        for each in found
    ]
