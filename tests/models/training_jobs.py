"""What the workers of `test_training` do: one training step, and its gradients."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fusion_core
from fusion_core import FusionConfig
from tests.models.calls import LENGTH, tokens
from tests.models.loading import AllFloat64, load, oracle
from tests.support.collectives import reaching_the_group


@dataclass
class Training:
    """Gradients of one step by name, and what was decided in the graphs of its forward and backward."""

    fused: dict[str, torch.Tensor]
    unfused: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]
    reports: list[dict[str, Any]]
    losses: tuple[float, float, float]
    calls: tuple[Counter[str], Counter[str]]


def train(path: Path) -> Training:
    """One training step by `fusion_core.compile` with merging, by Inductor alone, and in float64 on one rank."""
    torch._dynamo.reset()
    model = load(path, torch.float32).train()
    before = len(fusion_core.reports())

    def step(which: Any, call: Callable[..., Any]) -> tuple[dict[str, torch.Tensor], float]:
        which.zero_grad()
        loss = call(tokens(0, LENGTH), labels=tokens(0, LENGTH), use_cache=False).loss
        loss.backward()
        return {name: _whole(p.grad) for name, p in which.named_parameters()}, float(loss.detach())

    try:
        compiled = fusion_core.compile(model, FusionConfig(merge=True), fullgraph=True)
        fused, fused_loss = step(model, compiled)
        fused_calls = reaching_the_group(lambda: step(model, compiled))
        reports = [report.to_dict() for report in fusion_core.reports()[before:]]
        torch._dynamo.reset()
        plain = torch.compile(model, fullgraph=True)
        unfused, unfused_loss = step(model, plain)
        unfused_calls = reaching_the_group(lambda: step(model, plain))
    finally:
        model.zero_grad()
        model.eval()
    full = oracle(path, torch.float32)
    with AllFloat64():
        exact, exact_loss = step(full, full)
    return Training(
        fused, unfused, exact, reports, (fused_loss, unfused_loss, exact_loss), (fused_calls, unfused_calls)
    )


def _whole(gradient: Any) -> torch.Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach().clone()
