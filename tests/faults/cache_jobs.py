"""A process that compiles a model with an installed plugin of one kernel: what ran, and where the graph came from."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol

import fusion_core

HELPER = "ERROR = 3\n"
KERNEL = """
import torch
from torch import Tensor
from acme.helper import ERROR

@torch.library.custom_op("acme::fused", mutates_args=())
def fused(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return torch.full_like(x, ERROR), torch.empty_like(x)

@fused.register_fake
def _(x, residual, weight, eps, group):
    return torch.empty_like(x), torch.empty_like(x)
"""
TRACED = """
from acme.helper import ERROR

def fused(x, residual, weight, eps, group):
    return x * 0 + ERROR, x
"""
LATE = """
def fused(x, residual, weight, eps, group):
    from acme.late import fused
    return fused(x, residual, weight, eps, group)
"""
PLUGIN = """
from acme.ops import fused
from fusion_core import Strategy, hookimpl

@hookimpl
def fusion_strategies():
    return [Strategy("all_reduce_add_rms_norm", "acme.fused", fused, outputs=("normed", "residual_out"))]
"""


def install(folder: Path, kernel: str) -> None:
    """Install a distribution with a plugin whose kernel returns a constant of its helper module."""
    (folder / "acme").mkdir()
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    modules = {"__init__": PLUGIN, "ops": kernel, "helper": HELPER, "late": KERNEL}
    for name, source in modules.items():
        (folder / "acme" / f"{name}.py").write_text(source)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fusion_core.backends]\nacme = acme\n")
    listed = [*(f"acme/{name}.py" for name in modules), "acme-1.0.dist-info/METADATA"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in listed))


def start(folder: str, cache: str) -> tuple[str, float, str | None]:
    """Compile and run: the report's origin, the kernel's result, and the strategy's name."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True  # two versions written within a second may have the same timestamp
    importlib.invalidate_caches()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        total = funcol.all_reduce(x, "sum", dist.group.WORLD) + r
        return torch.nn.functional.rms_norm(total, w.shape, w, 1e-5)

    with torch.no_grad():
        found = torch.compile(model, backend="fusion_core")(torch.ones(4, 64), torch.ones(4, 64), torch.ones(64))
    report = fusion_core.last_report()
    assert report is not None
    return report.origin, found[0, 0].item(), report.sites[0].strategy if report.sites else None
