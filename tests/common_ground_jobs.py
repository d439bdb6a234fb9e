"""What the workers of `test_common_ground` do: rank 1 differs from the others, and the graph is compiled all the same."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fusion_core
from fusion_core import Dialect, DType, FusionConfig, FusionPass, Reading, Reason, Registry, Strategy
from fusion_core._inductor import post_grad_only
from fusion_core.agree import ranks as common_ground
from fusion_core.agree.exchange import Exchange
from fusion_core.agree.graph_groups import mentioned
from fusion_core.agree.ranks import agree
from fusion_core.dynamo import _pass_for
from fusion_core.plugins.registry import GROUP
from fusion_core.plugins.sources import core_sources
from fusion_core.site import Device
from fusion_core.tables.machine import Machine
from fusion_core.tables.table import UNFUSED, Row, Table
from tests.corpus.case import ADD, EPS, norm
from tests.models import plugins

HIDDEN, TOKENS = 64, 4
LIMIT = 20.0
"""Seconds that ranks wait for each other where they all come."""
REFERENCE = EntryPoint("reference", "fusion_reference", GROUP)
MARK = "fusion_core_model_tests"

core_sources()  # by all ranks at one time, whatever a developer edits while the tests run

Making = Callable[[bool], Registry]
"""From whether this rank is the odd one to its registry."""


# ---- backends


def _strategies(*requires: Any) -> Callable[[], Iterator[Strategy]]:
    def declared() -> Iterator[Strategy]:
        outputs = ("normed", "residual_out")
        yield Strategy(ADD, "acme.add", plugins._add_rms_norm, requires=requires, outputs=outputs)

    return declared


plain = SimpleNamespace(fusion_strategies=fusion_core.hookimpl(_strategies()))
stricter = SimpleNamespace(fusion_strategies=fusion_core.hookimpl(_strategies(DType("x", torch.float32))))
absent = SimpleNamespace(
    fusion_strategies=plain.fusion_strategies,
    fusion_available=fusion_core.hookimpl(lambda device: [Reason("driver", "the driver is 1", "2")]),
)
_WORDS = {"x": "x", "group": "group"}
reading = SimpleNamespace(
    fusion_strategies=plain.fusion_strategies,
    fusion_dialects=fusion_core.hookimpl(
        lambda: [Dialect("acme", {"acme::sum": Reading("all_reduce", _WORDS, results={"reduced": 0})})]
    ),
)


@dataclass
class Kernels(Distribution):
    """A distribution that lists no files."""

    number: str

    def read_text(self, filename: str) -> str | None:
        said = f"Metadata-Version: 2.1\nName: acme-kernels\nVersion: {self.number}\n"
        return said if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path("/nowhere", path)


def point(attribute: str, version: str = "1.0") -> EntryPoint:
    """An entry point named acme, of a distribution."""
    found = EntryPoint("acme", f"{__name__}:{attribute}", GROUP)
    vars(found)["dist"] = Kernels(version)
    return found


def of(*points: EntryPoint, **config: Any) -> Registry:
    return Registry.of([*points, REFERENCE], FusionConfig(**{"merge": True, **config}))


def _with(ordinary: Registry, **environment: str) -> Registry:
    with mock.patch.dict(os.environ, environment):
        return replace(ordinary, config=FusionConfig(merge=True))


def _table(us: float) -> Table:
    rows = (Row(ADD, "bfloat16", HIDDEN, TOKENS, {UNFUSED: 20.0, "acme.add": us}),)
    return Table(Machine.here(2, Device("cpu")), rows, "2026-11-22T10:00:00+00:00", "a measurement")


def keep_tables_in(folder: str) -> None:
    tables.append(folder)


tables: list[str] = []


def _measured(us: float) -> Registry:
    """Each rank has a file of its own."""
    file = Path(tables[-1], f"{dist.get_rank()}.json")
    file.write_text(json.dumps(_table(us).to_dict()), encoding="utf-8")
    return of(point("plain"), table=str(file))


def _failing() -> Registry:
    with mock.patch("fusion_core.plugins.registry.warn_once"):
        return of(point("not_there"))


DIFFERENCES: dict[str, Making] = {
    "nothing": lambda odd: of(point("plain")),
    "missing": lambda odd: of() if odd else of(point("plain")),
    "failing": lambda odd: _failing() if odd else of(point("plain")),
    "unavailable": lambda odd: of(point("absent" if odd else "plain")),
    "version": lambda odd: of(point("plain", "1.1" if odd else "1.0")),
    "declaration": lambda odd: of(point("stricter" if odd else "plain")),
    "dialect": lambda odd: of() if odd else of(point("reading")),
    "order": lambda odd: of() if not odd else _with(of(), FUSION_CORE_ORDER="reference"),
    "limit": lambda odd: of(point("plain")) if not odd else _with(of(point("plain")), FUSION_CORE_LIMIT="1"),
    "strict": lambda odd: of(point("plain"), strict=odd),
    "table": lambda odd: _measured(10.0 if odd else 30.0),
    "the same table": lambda odd: _measured(30.0),
    "no backend": lambda odd: Registry.of([] if odd else [REFERENCE], FusionConfig()),
}


# ---- one graph


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
        return found if call else _stop

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


def _stop(*args: Any) -> Any:
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


# ---- who comes when


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
    assert list(common.grounds) == names
    assert not common.reasons(names)
    return time.monotonic() - start


def nobody_comes() -> float:
    """Seconds that rank 0 waits where no other rank comes, for five groups."""
    groups = [dist.new_group() for _ in range(5)]
    start = time.monotonic()
    if dist.get_rank() == 0:
        with limit(2.0):
            common = agree([group.group_name for group in groups], of())
        assert len(common.reasons(common.grounds)) == 5
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


def keys() -> tuple[str | None, str | None, str, str]:
    """Of a pass that Inductor runs by itself, before and after; of one that is bound; and where ranks differ."""
    group, other = dist.new_group(), dist.new_group()
    own = FusionPass(registry=of(point("plain")))
    with limit(LIMIT):
        before = own.uuid()
        bound = own.among(group).uuid()
        half = own.uuid()
        assert half is None, "a group is left"
        own.among(*[each for each in dist.distributed_c10d._world.pg_map if dist.get_rank(each) >= 0])
        after = own.uuid()
        # the same facts on this rank, and others on the other: only the outcome tells
        twice = FusionPass(registry=of(point("plain", "1.0" if dist.get_rank() == 0 else "2.0"))).among(other).uuid()
    assert bound is not None
    assert twice is not None
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


# ---- which groups a graph shows


def shown() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Groups that Dynamo's graph of each spelling shows, and those that it should."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    tp: DeviceMesh = mesh["tp"]
    group = tp.get_group()
    x = torch.ones(4, 4)
    weight = distribute_tensor(torch.ones(4, 4), tp, [Shard(0)])

    def functional(x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "sum", group)

    def in_place(x: Tensor) -> Tensor:
        x = x * 1
        dist.all_reduce(x, group=group)
        return x

    def from_local(x: Tensor) -> Tensor:
        return DTensor.from_local(x, tp, [Partial()]).redistribute(tp, [Replicate()]).to_local()

    def with_weight(x: Tensor) -> Tensor:
        summed = torch.nn.functional.linear(DTensor.from_local(x, tp, [Replicate()]), weight)
        return summed.redistribute(placements=[Replicate()]).to_local()

    def of_dtensors(x: Tensor) -> Tensor:
        return (x @ x).redistribute(placements=[Replicate()]).to_local()  # type: ignore[attr-defined]

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(functional, x, use_reentrant=False)

    def local(x: Tensor) -> Tensor:
        return x.sum(-1)

    forms = (functional, in_place, from_local, with_weight, of_dtensors, checkpointed, local)
    found = {}
    for form in forms:
        names: list[tuple[str, ...]] = []

        def backend(graph_module: Any, inputs: Sequence[Any], names: list[Any] = names) -> Any:
            names.append(mentioned(graph_module, inputs))
            return _stop

        torch._dynamo.reset()
        with suppress(StopHere):
            given = weight if form is of_dtensors else x.clone().requires_grad_(form is checkpointed)
            torch.compile(form, backend=backend, fullgraph=True)(given)
        found[form.__name__] = (names[0], () if form is local else (str(group.group_name),))
    return found


def pretended() -> tuple[bool, bool]:
    """Whether a group of torch's fake backend, and one of a single rank, agree with themselves at once."""
    fake = dist.new_group(backend="fake")
    single = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with mock.patch.object(common_ground, "group_store", side_effect=AssertionError):
        registry = of()
        return tuple(not agree([each.group_name], registry).grounds for each in (fake, single))  # type: ignore[return-value]


# ---- all of Inductor


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
