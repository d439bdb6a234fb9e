"""What the workers of `test_by_tokens` run: one compiled graph over token counts whose paths differ."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed._functional_collectives import all_reduce
from torch.profiler import ProfilerActivity, profile

import fusion_core
from fusion_core import FusionConfig
from fusion_core.tables.machine import Machine
from fusion_core.tables.store import to_json
from fusion_core.tables.table import Row, Table

ADD = "all_reduce_add_rms_norm"
HIDDEN = 2048
KERNELS = {
    "fused_one_shot": "fusion_kernel_oneshot",
    "fused_two_shot": "fusion_kernel_twoshot",
    "symm_mem_two_shot": "two_shot_all_reduce_kernel",
    "nccl": "ncclDevKernel_AllReduce",
}


def table() -> str:
    """A table in which another path is fastest in each range: up to 16, 64, 256 tokens and above."""
    one, two = f"flashinfer.{ADD}", f"flashinfer.{ADD}_two_shot"
    symm = "reference.symm_mem_two_shot"
    fastest = {1: one, 16: one, 17: two, 64: two, 65: symm, 256: symm, 257: "unfused", 1024: "unfused"}
    rows = []
    for tokens, best in fastest.items():
        us = {name: 10.0 if name == best else 20.0 + tokens for name in (one, two, symm, "unfused")}
        rows.append(Row(ADD, "bfloat16", HIDDEN, tokens, us))
    made = Table(Machine.here(dist.get_world_size()), tuple(rows), "2026-11-23T00:00:00+00:00", "a test")
    path = Path(tempfile.mkdtemp(), "table.json")
    path.write_text(to_json(made))
    return str(path)


class Layers(nn.Module):
    """Two sites, each behind a matrix product of this rank's share."""

    def __init__(self) -> None:
        super().__init__()
        own = torch.Generator().manual_seed(dist.get_rank())
        common = torch.Generator().manual_seed(99)
        scale = (HIDDEN * dist.get_world_size()) ** -0.5
        self.up = nn.ParameterList(torch.randn(HIDDEN, HIDDEN, generator=own) * scale for _ in range(2))
        self.norm = nn.ParameterList(torch.rand(HIDDEN, generator=common) + 0.5 for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, residual = x, x
        for up, weight in zip(self.up, self.norm, strict=True):
            residual = residual + all_reduce(h @ up, "sum", dist.group.WORLD)
            wide = residual.float() if residual.dtype is not torch.float64 else residual
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            h = weight * wide.to(residual.dtype)
        return h, residual


def given(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, HIDDEN, generator=generator).cuda()


def ran(run: Any) -> list[str]:
    """Which collectives ran in a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    return sorted({label for label, part in KERNELS.items() if any(part in name for name in names)})


def crossing(mode: str | None, sizes: list[int]) -> tuple[list[list[str]], list[float], int, str]:
    """What ran at each size, its error over that of the model without fusion, how many graphs there are, the report."""
    torch._dynamo.reset()
    counters.clear()
    module = Layers().cuda().requires_grad_(False)
    exact = Layers().cuda().double().requires_grad_(False)
    for one, other in zip(exact.parameters(), module.parameters(), strict=True):
        one.data.copy_(other.data.to(torch.bfloat16))
    module = module.to(torch.bfloat16)
    config = FusionConfig(table=table())
    compiled = fusion_core.compile(module, config, mode=mode, fullgraph=True)
    labels, ratios = [], []
    with torch.no_grad():
        for size in sizes:
            x = given(size).to(torch.bfloat16)
            torch._dynamo.mark_dynamic(x, 0)
            for _ in range(3):
                h, residual = (each.clone() for each in compiled(x))
            labels.append(ran(lambda x=x: compiled(x)))
            right = exact(x.double())
            plain = module(x)
            mine = sum(float((a.double() - b).square().mean()) for a, b in zip((h, residual), right, strict=True))
            theirs = sum(float((a.double() - b).square().mean()) for a, b in zip(plain, right, strict=True))
            ratios.append(mine / theirs)
    graphs = counters["stats"]["unique_graphs"]
    report = str(fusion_core.last_report())
    torch._dynamo.reset()
    return labels, ratios, graphs, report


def bits(sizes: list[int]) -> list[bool]:
    """Whether the first row's sum has the same bits in batches of these sizes, with deterministic numerics."""
    torch._dynamo.reset()
    config = FusionConfig(numerics="deterministic", max_tokens=256)

    def summed(x: Tensor) -> Tensor:
        return all_reduce(x * 2, "sum", dist.group.WORLD)

    compiled = fusion_core.compile(summed, config, fullgraph=True)
    own = torch.Generator("cuda").manual_seed(dist.get_rank())
    x = torch.randn(max(sizes), HIDDEN, generator=own, device="cuda", dtype=torch.bfloat16)
    found = []
    with torch.no_grad():
        for size in sizes:
            part = x[:size].clone()
            torch._dynamo.mark_dynamic(part, 0)
            found.append(compiled(part)[0].clone())
    report = fusion_core.last_report()
    assert report is not None
    assert [site.strategy for site in report.sites] == ["flashinfer.all_reduce"], str(report)
    return [bool(torch.equal(each, found[0])) for each in found]
