"""A backend whose kernel is one operator, for tests of what the pass puts into a graph."""

from importlib.metadata import EntryPoint
from typing import Any

import torch

from fusion_core import Strategy
from tests.support.graphs import plugin
from tests.test_matching import ADD, norm

c10d = torch.ops._c10d_functional


@torch.library.custom_op("fusion_core_tests::add_rms_norm", mutates_args=())
def opaque(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A backend's kernel: all of the chain behind one operator."""
    total = c10d.wait_tensor(c10d.all_reduce(x, "sum", group)) + residual
    return norm(total, weight, eps), total.clone()


@opaque.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: Any, eps: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def acme(monkeypatch: Any, *strategies: Strategy) -> EntryPoint:
    return plugin(monkeypatch, "acme", fusion_strategies=lambda: strategies)


KERNEL = Strategy(ADD, "acme.add", opaque, outputs=("normed", "residual_out"))
