"""Sums of all_reduces' results that can be merged, and what a graph shows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fusion_core.lift.collectives import TARGETS
from tests.corpus.case import N, norm, reduce
from tests.support.graphs import Fused


def given(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Three partial results, a residual and a weight."""
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape or (2, 3, N), generator=generator) for _ in range(4))
    return *(tensor.to(dtype) for tensor in tensors), torch.randn(N, generator=generator).to(dtype)


def anchors(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in TARGETS]


def assert_unmerged(fused: Fused) -> None:
    assert fused.before == fused.after
    assert not [merge for merge in fused.reports[0].merges if not merge.reasons]


def said(fused: Fused) -> list[str]:
    return [str(reason) for merge in fused.reports[0].merges for reason in merge.reasons]


def directly(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = reduce(a) + reduce(b)
    return norm(h + r, w), h + r


def residual_first(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = (r + reduce(a)) + reduce(b)
    return norm(h, w), h


def residual_last(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + (reduce(a) + reduce(b))
    return norm(h, w), h


def residual_between(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = (reduce(a) + r) + reduce(b)
    return norm(h, w), h


def second_first(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    first, second = reduce(a), reduce(b)
    h = (second + r) + first
    return norm(h, w), h


def of_three(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = (reduce(a) + reduce(b)) + (r + reduce(c))
    return norm(h, w), h


def with_biases(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    """Phi's projections add a bias each; of three results two leave nothing but these."""
    h = (((reduce(a) + w) + (reduce(b) + w)) + reduce(c)) + r
    return norm(h, w), h


def view_on_one_side(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + (reduce(a.view(-1, N)).view(a.shape) + reduce(b))
    return norm(h, w), h


def view_of_the_last(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + (reduce(a) + reduce(b.view(-1, N)).view(a.shape))
    return norm(h, w), h


def views_on_both_sides(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r.view(-1, N) + (reduce(a).view(-1, N) + reduce(b).reshape(-1, N))
    return norm(h, w), h


def in_place(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    first, second = a * 2, b * 2
    dist.all_reduce(first)
    dist.all_reduce(second)
    h = r + (first + second)
    return norm(h, w), h


def behind_an_embedding(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    """The first layer of Cohere: the residual is a sum itself, and both branches are computed from it."""
    stream = reduce(c)
    normed = norm(stream, w)
    h = (stream + reduce(normed * a)) + reduce(normed * b)
    return norm(h, w), h


FORMS: dict[str, tuple[Callable[..., Any], int, int]] = {
    form.__name__: (form, merged, left)
    for form, merged, left in (
        (directly, 2, 1), (residual_first, 2, 1), (residual_last, 2, 1), (residual_between, 2, 1), (second_first, 2, 1),
        (of_three, 3, 1), (with_biases, 3, 1), (view_on_one_side, 2, 1), (view_of_the_last, 2, 1),
        (views_on_both_sides, 2, 1), (in_place, 2, 1), (behind_an_embedding, 2, 2),
    )
}  # fmt: skip


def used_beside(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    first = reduce(a)
    return norm(r + (first + reduce(b)), w), torch.tanh(first)
