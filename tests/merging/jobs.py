"""What the workers of `test_numbers` do: the same sums with and without merging, against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fusion_core import FusionConfig, FusionPass, Report
from fusion_core._torch.inductor import post_grad_only
from tests.corpus.case import norm
from tests.support.collectives import reaching_the_group

HIDDEN, TOKENS = 256, 32


@dataclass
class Errors:
    """Against float64: the largest of the next residual and the norm, and the mean square of the residual's."""

    largest: float
    squared: float


@dataclass
class Run:
    """What one rank saw of one form over all seeds.

    Attributes:
        merges: How many all_reduces each merge of the compiled graph took.
        calls: all_reduces that reached the process group in one call, merged and unmerged.
        merged: By the reference backend; an element a seed, as are the others.
        unmerged: The same without merging: the norm is fused with one of the sums.
        written: As the model is written, nothing fused.
    """

    merges: list[int]
    calls: tuple[int, int]
    merged: list[Errors]
    unmerged: list[Errors]
    written: list[Errors]


def total(x: Tensor) -> Tensor:
    return funcol.all_reduce(x * 1, "sum", dist.group.WORLD)


def direct(r: Tensor, w: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Any:
    h = r + (total(x) + total(y))
    return norm(h, w), h


def of_three(r: Tensor, w: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Any:
    h = (total(x) + total(y)) + (r + total(z))
    return norm(h, w), h


def residual_between(r: Tensor, w: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Any:
    h = (total(x) + r) + total(y)
    return norm(h, w), h


def another_shape(r: Tensor, w: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Any:
    """Routed experts over flattened tokens."""
    h = r + (total(x.view(2, -1, HIDDEN)).view(-1, HIDDEN) + total(y))
    return norm(h, w), h


FORMS: dict[str, Callable[..., Any]] = {
    "direct": direct,
    "of three": of_three,
    "residual between": residual_between,
    "another shape": another_shape,
}


def given(seed: int, rank: int) -> tuple[Tensor, ...]:
    """Residual and weight are the same on every rank, the rest is its own."""
    common, own = (torch.Generator().manual_seed(number) for number in (seed, 1000 * (rank + 1) + seed))
    r, w = torch.randn(TOKENS, HIDDEN, generator=common), torch.randn(HIDDEN, generator=common)
    parts = (torch.randn(TOKENS, HIDDEN, generator=own) for _ in range(3))
    return tuple(tensor.bfloat16() for tensor in (r, w, *parts))


def exact(form: str, seed: int) -> tuple[Tensor, ...]:
    everyone = [given(seed, rank) for rank in range(dist.get_world_size())]
    r, w = (tensor.double() for tensor in everyone[0][:2])
    parts = everyone[0][2:] if form == "of three" else everyone[0][2:4]
    h = r + sum(tensors[2 + index].double() for tensors in everyone for index in range(len(parts)))
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * w, h


def errors(found: tuple[Tensor, ...], oracle: tuple[Tensor, ...]) -> Errors:
    off = [(a.double() - b) for a, b in zip(found, oracle, strict=True)]
    return Errors(max(float(e.abs().max()) for e in off), float(off[1].pow(2).mean()))


def compiled(function: Callable[..., Any], merge: bool, reports: list[Report]) -> Callable[..., Any]:
    """Up to Inductor's post-grad graph, which then runs eagerly."""
    own = FusionPass(FusionConfig(order=("reference",), merge=merge))
    torch._dynamo.reset()
    call = torch.compile(function, backend=post_grad_only(lambda graph: reports.append(own.run(graph))), fullgraph=True)
    return torch.no_grad()(call)


def run(form: str, seeds: int) -> Run:
    rank = dist.get_rank()
    reports: list[Report] = []
    calls, found = [], []
    for merge in (True, False):
        call = compiled(FORMS[form], merge, reports)
        found.append([errors(call(*given(seed, rank)), exact(form, seed)) for seed in range(seeds)])
        calls.append(reaching_the_group(functools.partial(call, *given(0, rank)))["all_reduce"])
    written = [errors(FORMS[form](*given(seed, rank)), exact(form, seed)) for seed in range(seeds)]
    return Run([len(merge.nodes) for merge in reports[0].merges], (calls[0], calls[1]), found[0], found[1], written)


def in_float16(x: tuple[float, float], y: tuple[float, float]) -> tuple[float, float]:
    """The sum of two results, with and without the switch, where each rank has its element of x and y everywhere."""
    rank = dist.get_rank()
    parts = [torch.full((4, HIDDEN), values[rank], dtype=torch.float16) for values in (x, y)]
    found = [float(compiled(_sum, merge, [])(*parts)[0, 0]) for merge in (True, False)]
    return found[0], found[1]


def _sum(x: Tensor, y: Tensor) -> Tensor:
    return total(x) + total(y)
