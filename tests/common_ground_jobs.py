"""What the workers of `test_common_ground` do: rank 1 differs from the others, and the graph is compiled all the same."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

import fusion_core
from fusion_core import FusionPass, Registry
from fusion_core._torch.inductor import post_grad_only
from fusion_core.agree import ranks as common_ground
from fusion_core.agree.exchange import Exchange
from fusion_core.agree.graph_groups import mentioned
from fusion_core.agree.ranks import agree
from fusion_core.dynamo import _pass_for
from fusion_core.plugins.sources import core_sources
from tests.corpus.case import EPS, norm
from tests.odd_registries import DIFFERENCES, HIDDEN, REFERENCE, TOKENS, of, point

LIMIT = 20.0
"""Seconds that ranks wait for each other where they all come."""
MARK = "fusion_core_model_tests"

core_sources()  # by all ranks at one time, whatever a developer edits while the tests run


@dataclass
class Found:
    """What one rank saw.

    Attributes:
        strategies: What was chosen at each all_reduce.
        merged: How many all_reduces each merge took.
        reasons: Of everything that was refused for want of agreement.
        text: The report.
        again: The report as a page, and as text behind a trip through JSON.
        key: The pass's cache key.
        warned: What was warned of.
        error: Of the results, against float64; None where nothing ran.
        seconds: That agreeing and compiling took.
    """

    strategies: list[str | None]
    merged: list[int]
    reasons: list[str]
    text: str
    again: tuple[str, str]
    key: str | None
    warned: list[str]
    error: float | None
    seconds: float


class StopHere(Exception):
    """Instead of a call: what is compiled is not run."""


def given(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own, common = (torch.Generator().manual_seed(seed) for seed in (rank, 99))
    x, y = (torch.randn(TOKENS, HIDDEN, generator=own).bfloat16() for _ in range(2))
    return x, y, torch.randn(TOKENS, HIDDEN, generator=common).bfloat16(), torch.ones(HIDDEN).bfloat16()


def model(group: dist.ProcessGroup) -> Callable[..., Any]:
    """Two all_reduces that could be one, and a third."""

    def forward(x: Tensor, y: Tensor, residual: Tensor, weight: Tensor) -> Any:
        both = funcol.all_reduce(x * 1, "sum", group) + funcol.all_reduce(y * 1, "sum", group)
        h = residual + both
        h = h + funcol.all_reduce(norm(h, weight) * 0.5, "sum", group)
        return norm(h, weight), h

    return forward


def exact(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    def rms(value: Tensor) -> Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + EPS)

    tensors = [given(rank) for rank in dist.get_process_group_ranks(group)]
    h = tensors[0][2].double() + sum(x.double() + y.double() for x, y, *_ in tensors)
    h = h + group.size() * 0.5 * rms(h)
    return rms(h), h


def compiled(
    group: dist.ProcessGroup, registry: Registry, *, bound: bool = True, call: bool = True, dry_run: bool = False
) -> Found:
    """Compile up to Inductor's post-grad graph, in the way of our Dynamo backend (``bound``) or Inductor's own."""
    reports, keys = [], []

    def backend(graph_module: Any, inputs: Sequence[Any]) -> Any:
        own = FusionPass(registry=registry, dry_run=dry_run)
        own = own.among(*mentioned(graph_module, inputs)) if bound else own
        found = post_grad_only(lambda graph: reports.append(own.run(graph)))(graph_module, inputs)
        keys.append(own.uuid())
        return found if call else stop

    start = time.monotonic()
    torch._dynamo.reset()
    error = None
    with torch.no_grad(), mock.patch.object(common_ground.warnings, "warn") as warn:
        try:
            results = torch.compile(model(group), backend=backend, fullgraph=True)(*given(dist.get_rank()))
        except StopHere:
            results = None
    seconds = time.monotonic() - start
    if results is not None:
        error = max(float((a.double() - b).abs().max()) for a, b in zip(results, exact(group), strict=True))
    (report,) = reports
    return Found(
        [site.strategy for site in report.sites],
        [len(merge.nodes) for merge in report.merges if not merge.reasons],
        sorted({str(r) for site in report.sites for d in site.decisions for r in d.reasons if r.code == "agreement"}),
        str(report),
        _again(report),
        keys[0],
        [text for each in warn.call_args_list if (text := str(each.args[0])).startswith("fusion_core: process group")],
        error,
        seconds,
    )


def stop(*args: Any) -> Any:
    raise StopHere


def _again(report: fusion_core.Report) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        report.to_html(page)
        return page.read_text(encoding="utf-8"), str(
            fusion_core.Report.from_dict(json.loads(json.dumps(report.to_dict())))
        )


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    with mock.patch.object(common_ground, "TIMEOUT", seconds):
        yield


def differing(name: str, bound: bool, ranks: Sequence[int] = (0, 1)) -> Found | None:
    """Compile and run where the last of these ranks differs by ``name``, in a group of their own."""
    group = dist.new_group(list(ranks))
    if dist.get_rank() not in ranks:
        return None
    with limit(LIMIT):
        return compiled(group, DIFFERENCES[name](dist.get_rank() == ranks[-1]), bound=bound)


def late(seconds: float, limit_seconds: float, bound: bool) -> Found:
    """Rank 1 comes so much later."""
    group = dist.new_group()
    dist.barrier()  # so that the limit counts from one moment
    if dist.get_rank() == 1:
        time.sleep(seconds)
    with limit(limit_seconds):
        found = compiled(group, of(point("plain")), bound=bound)
    dist.barrier()
    return found


def dies(folder: str, rank: int) -> None:
    """A process of its own, of three; the last one dies before it publishes anything."""
    store = dist.TCPStore("127.0.0.1", int(os.environ["STORE_PORT"]), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    if rank == 2:
        os._exit(9)
    assert dist.group.WORLD is not None
    with limit(3.0):
        found = compiled(dist.group.WORLD, of(point("plain")), call=False)
    said = repr((found.strategies, found.merged, found.text, found.seconds))
    Path(folder, str(rank)).write_text(said, encoding="utf-8")
    os._exit(0)


def in_a_ring() -> float:
    """Three groups of two ranks each; every rank asks its own two in another order."""
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([0, 2])]
    ours = {0: (0, 2), 1: (1, 0), 2: (2, 1)}[dist.get_rank()]
    names = [groups[index].group_name for index in ours]
    dist.barrier()
    start = time.monotonic()
    with limit(5.0):
        common = agree(names, of())
    assert list(common.differences_of) == names
    assert not common.reasons(names)
    return time.monotonic() - start


def nobody_comes() -> float:
    """Seconds that rank 0 waits where no other rank comes, for five groups."""
    groups = [dist.new_group() for _ in range(5)]
    start = time.monotonic()
    if dist.get_rank() == 0:
        with limit(2.0):
            common = agree([group.group_name for group in groups], of())
        assert len(common.reasons(common.differences_of)) == 5
    return time.monotonic() - start


def exchanges(bound: bool) -> list[Any]:
    """How often ranks settle: for two passes over one group, for another configuration, and for a dry run."""
    group, counts = dist.new_group(), []
    settle = Exchange.settle
    with limit(LIMIT), mock.patch.object(Exchange, "settle", autospec=True, side_effect=settle) as made:
        compiled(group, of(), dry_run=True, bound=False)
        counts.append(made.call_count)
        for registry in (of(), of(), of(limit=0)):
            compiled(group, registry, bound=bound)
            counts.append(made.call_count)
    return counts


def keys() -> tuple[str, str, str, str]:
    """Of a pass that Inductor runs by itself, before and after; of one that is bound; and where ranks differ."""
    group, other = dist.new_group(), dist.new_group()
    own = FusionPass(registry=of(point("plain")))
    with limit(LIMIT):
        before = own.uuid()
        bound = own.among(group).uuid()
        half = own.uuid()
        assert not half, "a group is left"
        own.among(*[each for each in dist.distributed_c10d._world.pg_map if dist.get_rank(each) >= 0])
        after = own.uuid()
        # the same facts on this rank, and others on the other: only the outcome tells
        twice = FusionPass(registry=of(point("plain", "1.0" if dist.get_rank() == 0 else "2.0"))).among(other).uuid()
    return before, after, bound, twice


def hidden() -> Found:
    """A pass that was bound to another group meets this one."""
    group, other = dist.new_group(), dist.new_group()
    with limit(LIMIT), mock.patch(f"{__name__}.mentioned", return_value=(other.group_name,)):
        return compiled(group, of(point("plain")))


def eager(name: str) -> tuple[int, float]:
    """Calls of acme's operator by two eager calls, and the error."""
    group = dist.new_group()
    registry = DIFFERENCES[name](dist.get_rank() == 1)
    x, _, residual, weight = given(dist.get_rank())
    with limit(LIMIT), mock.patch.object(fusion_core.ops, "_registry_for", return_value=registry):
        profile = torch.profiler.profile()
        with profile:
            for _ in range(2):
                normed, _ = fusion_core.ops.all_reduce_add_rms_norm(x, residual, weight, EPS, group=group)
    called = sum(event.count for event in profile.key_averages() if event.key.startswith(MARK))
    h = residual.double() + sum(given(rank)[0].double() for rank in range(dist.get_world_size()))
    wanted = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return called, float((normed.double() - wanted).abs().max())


def started(caches: Sequence[str], odd: bool) -> tuple[str, list[str | None], str, float]:
    """Compile by ``backend="fusion_core"``, each rank with its own cache: the report's origin, what ran, the error."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches[dist.get_rank()]
    points = [REFERENCE] if odd and dist.get_rank() == 1 else [point("plain"), REFERENCE]
    _pass_for.cache_clear()
    group = dist.group.WORLD
    assert group is not None
    with limit(LIMIT), torch.no_grad(), mock.patch("fusion_core.plugins.registry.entry_points", return_value=points):
        results = torch.compile(model(group), backend="fusion_core", fullgraph=True)(*given(dist.get_rank()))
    report = fusion_core.last_report()
    assert report is not None
    error = max(float((a.double() - b).abs().max()) for a, b in zip(results, exact(group), strict=True))
    return report.origin, [site.strategy for site in report.sites], str(report), error
