"""A model on a kernel that pairs with nothing but itself, and one group's calls of it."""

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
from fusion_core import FusionConfig, FusionPass, Reason, Registry, Site, Strategy
from fusion_core._torch.inductor import post_grad_only
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
