"""What the workers of `test_kernel_calls` do: run a model on a kernel that pairs with nothing but itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

import fusion_core
from fusion_core import FusionConfig, FusionPass, RanksDiffer, Reason, Registry, Site, Strategy, ops
from fusion_core._inductor import post_grad_only
from fusion_core.agree import kernel_calls
from fusion_core.agree import ranks as common_ground
from fusion_core.plugins.registry import GROUP
from fusion_core.report import history
from tests.corpus.case import ADD, EPS, norm

HIDDEN = 64
REFERENCE = EntryPoint("reference", "fusion_reference", GROUP)
ran: list[str] = []


@torch.library.custom_op("fusion_core_tests::gathered", mutates_args=())
def gathered(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    """A kernel: what it sends pairs with no all_reduce."""
    ran.append("kernel")
    c10d = torch.ops._c10d_functional
    size = dist.distributed_c10d._resolve_process_group(group).size()
    parts = c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous(), size, group))
    total = parts.view(size, *x.shape).sum(0) + residual
    return torch.nn.functional.rms_norm(total, x.shape[-1:], weight, eps), total


@gathered.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@dataclass(frozen=True)
class OnThisRank:
    """A requirement that one rank alone does not meet."""

    missing: bool

    def unmet(self, site: Site) -> Reason | None:
        return Reason("here", "this rank lacks something", "it") if self.missing else None

    def __repr__(self) -> str:
        return "OnThisRank()"


@torch.library.custom_op("fusion_core_tests::gathered_late", mutates_args=())
def fails_late(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = gathered(x, residual, weight, eps, group)
    return found


@fails_late.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    if dist.get_rank() == 1:
        raise RuntimeError("not on this rank")
    return torch.empty_like(x), torch.empty_like(x)


def fails_to_trace(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    if dist.get_rank() == 1:
        raise RuntimeError("not on this rank")
    found: tuple[Tensor, Tensor] = gathered(x, residual, weight, eps, group)
    return found


def registry(impl: Any = gathered, *requires: Any, **config: Any) -> Registry:
    outputs = ("normed", "residual_out")
    acme = SimpleNamespace(
        fusion_strategies=fusion_core.hookimpl(
            lambda: [Strategy(ADD, "acme.gathered", impl, requires, outputs=outputs)]
        )
    )
    point = EntryPoint("acme", f"{__name__}:acme", GROUP)
    with mock.patch.dict(globals(), acme=acme):
        return Registry.of([point, REFERENCE], FusionConfig(**config))


@dataclass
class Found:
    """What one rank saw.

    Attributes:
        errors: Of each call's results, against float64.
        ran: How many kernels each call ran.
        run_time: Why sites run unfused.
        refused: What the report says that ranks differ in.
        warned: What was warned of.
        seconds: That each call took.
        raised: The error of the last call.
        sites: What was found at each all_reduce, and what runs there.
    """

    errors: list[float] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    run_time: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    raised: str = ""
    sites: list[tuple[str, str | None]] = field(default_factory=list)


def given(rank: int, tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    own, common = (torch.Generator().manual_seed(seed) for seed in (rank, 99))
    x = torch.randn(tokens, HIDDEN, generator=own)
    return x, torch.randn(tokens, HIDDEN, generator=common), torch.rand(HIDDEN, generator=common) + 0.5


BETWEEN = ("between",)
EVERYWHERE = ("in front", "before the norm", "between", "before the last norm", "behind")


def model(group: dist.ProcessGroup, breaks: Sequence[str] = ()) -> Callable[..., Any]:
    """Two all_reduces, each with its norm; the graph breaks at these places."""

    def forward(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        x = x * 1
        if "in front" in breaks:
            torch._dynamo.graph_break()
        h = residual + funcol.all_reduce(x, "sum", group)
        if "before the norm" in breaks:
            torch._dynamo.graph_break()
        normed = norm(h, weight)
        if "between" in breaks:
            torch._dynamo.graph_break()
        h = h + funcol.all_reduce(normed * 0.5, "sum", group)
        if "before the last norm" in breaks:
            torch._dynamo.graph_break()
        normed = norm(h, weight)
        if "behind" in breaks:
            torch._dynamo.graph_break()
        return normed + 0, h

    return forward


def exact(tokens: int = 4) -> tuple[Tensor, Tensor]:
    def rms(value: Tensor) -> Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()

    tensors = [given(rank, tokens) for rank in range(dist.get_world_size())]
    weight = tensors[0][2]
    h = tensors[0][1].double() + sum(x.double() for x, *_ in tensors)
    h = h + len(tensors) * 0.5 * rms(h)
    return rms(h), h


SHORT, PATIENT = 2.0, 60.0
"""Seconds that ranks wait: for one that never comes, and for one that may be slow to compile."""


class Session:
    """One group, and what became of each call in it."""

    def __init__(self, limit: float = PATIENT) -> None:
        self.group = dist.new_group()
        self.found = Found()
        self.limit = limit
        self.reports: list[fusion_core.Report] = []
        torch._dynamo.reset()

    def compiled(self, own: Registry, *, breaks: Sequence[str] = (), whole: bool = False) -> Callable[..., Any]:
        """The model compiled: up to Inductor's post-grad graph, or whole."""
        function = model(self.group, breaks)
        with mock.patch.object(common_ground, "TIMEOUT", self.limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fused = FusionPass(registry=own).among(self.group)
        if whole:
            options = {"post_grad_custom_post_pass": fused, "fx_graph_cache": False}
            return torch.compile(function, options=options)
        run = fused.run
        return torch.compile(function, backend=post_grad_only(lambda g: self.reports.append(run(g))))

    def __call__(self, function: Callable[..., Any], tokens: int = 4, dynamic: bool = False) -> None:
        ran.clear()
        start = time.monotonic()
        tensors = given(dist.get_rank(), tokens)
        for tensor in tensors[:2] if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        with (
            torch.no_grad(),
            warnings.catch_warnings(record=True) as warned,
            mock.patch.object(kernel_calls, "TIMEOUT", self.limit),
            history.collecting() as reports,
        ):
            warnings.simplefilter("always")
            results = function(*tensors)
        self.reports += reports
        self.found.seconds.append(time.monotonic() - start)
        self.found.ran.append(len(ran))
        self.found.warned += [text for each in warned if (text := str(each.message)).startswith("fusion_core")]
        off = (float((a.double() - b).abs().max()) for a, b in zip(results, exact(tokens), strict=True))
        self.found.errors.append(max(off))

    def done(self) -> Found:
        sites = [site for report in self.reports for site in report.sites]
        self.found.refused = [str(r) for report in self.reports for each in report.disagreements.values() for r in each]
        self.found.run_time = sorted({str(reason) for site in sites for reason in site.run_time})
        dist.barrier()  # of the default group: the other rank is through as well
        return self.found


def alike(whole: bool, dynamic: bool) -> Found:
    """All ranks run one graph."""
    session = Session()
    call = session.compiled(registry(), whole=whole)
    for tokens in (4, 6, 3) if dynamic else (4, 4):
        session(call, tokens, dynamic)
    return session.done()


BREAKS = {
    "a graph break": BETWEEN,
    "a break in front": ("in front",),
    "a break behind": ("behind",),
    "breaks everywhere": EVERYWHERE,
}


def differing(how: str) -> Found:
    """Rank 1 differs."""
    both_ask = ("a graph break", "dynamic sizes", "a break in front", "a break behind")
    session, odd = Session(PATIENT if how in both_ask else SHORT), dist.get_rank() == 1
    own = {
        "a requirement": lambda: registry(gathered, OnThisRank(odd)),
        "a trace that fails": lambda: registry(fails_to_trace),
        "a fake that fails": lambda: registry(fails_late),
        "an order": lambda: registry(order=("reference",)) if odd else registry(),
        "a limit": lambda: registry(limit=1) if odd else registry(),
    }.get(how, registry)()
    if how == "suppressed errors" and odd:
        with torch._dynamo.config.patch(suppress_errors=True):
            session.compiled(own)  # it agrees on what it has, and then cannot compile
            call = torch.compile(model(session.group), backend=_raises)
            session(call)
    else:
        call = session.compiled(own, breaks=BREAKS.get(how, ()) if odd else (), whole=how == "a graph break")
        if how == "eager" and odd:
            call = model(session.group)
        session(call, dynamic=odd and how == "dynamic sizes")
    session(call, dynamic=odd and how == "dynamic sizes")
    return session.done()


def _raises(graph_module: Any, inputs: Any) -> Any:
    raise RuntimeError("this backend does not compile")


def both_take_other_graphs(changed: bool) -> Found:
    """A graph that ranks agree on, then one that differs, then the first one again: unfused by now on both ranks."""
    session, odd = Session(), dist.get_rank() == 1
    first = session.compiled(registry())
    session(first)
    session(session.compiled(registry(), breaks=BETWEEN if odd and changed else ()), 6)
    session(first)
    return session.done()


def one_takes_another_graph() -> Found:
    """After a graph that ranks agreed on, one rank alone takes another: it must raise, for the other is in a kernel."""
    session, odd = Session(), dist.get_rank() == 1
    first = session.compiled(registry())
    session(first)
    if odd:
        other = session.compiled(registry(), breaks=BETWEEN)
        session.limit = SHORT
        try:
            session(other)
        except RanksDiffer as error:
            session.found.raised = str(error)
        x, residual, weight = given(1)  # what the other rank waits for inside of its kernels
        name = session.group.group_name
        normed, _ = gathered(x * 1, residual, weight, EPS, name)
        gathered(normed * 0.5, residual, weight, EPS, name)
    else:
        session(first)
    return session.done()


def interrupted(times: int) -> Found:
    """Rank 1 is interrupted while it waits, and tries again."""
    session, odd = Session(), dist.get_rank() == 1
    call = session.compiled(registry())
    if odd:
        looks = iter(range(1000))

        def interrupt(seconds: float) -> None:
            if next(looks) < times:
                raise KeyboardInterrupt
            time_sleep(seconds)

        time_sleep = time.sleep
        for _ in range(times):
            with mock.patch("fusion_core.agree.agreement.time.sleep", interrupt):
                try:
                    session(call)
                except KeyboardInterrupt:
                    continue
                break
        if len(session.found.errors) == 0:
            session(call)
    else:
        time.sleep(1.0)
        session(call)
    return session.done()


def by_hand(differ: bool) -> Found:
    """The eager function of the pattern, where rank 1 may take another strategy."""
    session, odd = Session(SHORT if differ else PATIENT), dist.get_rank() == 1
    x, residual, weight = given(dist.get_rank())
    name = session.group.group_name
    own = registry(gathered, OnThisRank(differ and odd))
    exactly = exact_sum()
    with (
        mock.patch.object(ops, "_registry_for", return_value=own),
        mock.patch.object(kernel_calls, "TIMEOUT", session.limit),
        warnings.catch_warnings(record=True) as warned,
        torch.no_grad(),
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            ran.clear()
            results = ops.all_reduce_add_rms_norm(x, residual, weight, EPS, group=name)
            session.found.ran.append(len(ran))
            off = (float((a.double() - b).abs().max()) for a, b in zip(results, exactly, strict=True))
            session.found.errors.append(max(off))
    session.found.warned = [str(each.message) for each in warned]
    return session.done()


def exact_sum() -> tuple[Tensor, Tensor]:
    tensors = [given(rank) for rank in range(dist.get_world_size())]
    h = tensors[0][1].double() + sum(x.double() for x, *_ in tensors)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * tensors[0][2].double(), h


def side_by_side(break_on_one: bool) -> Found:
    """Attention and MLP side by side, by ``torch.compile(backend="fusion_core")`` as users call it; nothing set."""
    odd, found = dist.get_rank() == 1, Found()

    def block(x: Tensor, y: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        attention = funcol.all_reduce(x * 1, "sum", dist.group.WORLD)
        if odd and break_on_one:
            torch._dynamo.graph_break()
        mlp = funcol.all_reduce(y * 2, "sum", dist.group.WORLD)
        hidden = residual + (attention + mlp)
        return hidden + funcol.all_reduce(norm(hidden, weight) * y, "sum", dist.group.WORLD)

    x, residual, weight = given(dist.get_rank())
    y = x.flip(0) + 1
    torch._dynamo.reset()
    with torch.no_grad(), history.collecting() as reports:
        wanted = block(x, y, residual, weight)
        compiled = torch.compile(block, backend="fusion_core")
        for _ in range(2):
            found.errors.append(float((compiled(x, y, residual, weight) - wanted).abs().max()))
    found.sites = [(site.pattern, site.strategy) for report in reports for site in report.sites]
    dist.barrier()
    return found


def one_is_configured_anew() -> Found:
    """After a graph that ranks agreed on, one rank alone takes another configuration."""
    session, odd = Session(), dist.get_rank() == 1
    first = session.compiled(registry())
    session(first)
    if odd:
        session.limit = SHORT
        try:
            session.compiled(registry(limit=1))
        except RanksDiffer as error:
            session.found.raised = str(error)
    return session.done()
