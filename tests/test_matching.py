"""Where a pattern stands in a graph that was written in plain torch. Spellings are rows of `tests.corpus`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import _functional_collectives as funcol

from fusion_core import FusionConfig, SiteReport, Stage, Strategy
from fusion_core.patterns import CORE_PATTERNS
from tests.corpus.case import ADD, N, gemma, norm, reduce
from tests.support.graphs import fuse, plugin, registry

pytestmark = pytest.mark.usefixtures("one_rank")

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(dtype: torch.dtype = torch.bfloat16, *rows: int) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shape = (*(rows or (2, 3)), N)
    x, residual, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape, (N,)))
    return x.to(dtype), residual.to(dtype), weight.to(dtype)


def add_then(spelling: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        total = r + reduce(x)
        return spelling(total, w), total

    return model


def two_views(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r.view(-1, N) + reduce(x).view(-1, N)
    return norm(total.view(x.shape), w), total


@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (2, 1, 3)], ids=["1-D", "2-D", "3-D", "4-D"])
def test_a_chain_is_found_in_any_number_of_dimensions(rows: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, r = (torch.randn(*rows, N, generator=generator) for _ in range(2))
    fused = fuse(add_then(norm), x, r, torch.ones(N))
    assert fused.site.pattern == ADD


def test_a_chain_is_found_with_a_token_count_known_only_at_run_time() -> None:
    x, r, w = tensors()
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(r, 1)
    fused = fuse(add_then(norm), x, r, w)
    assert fused.site.strategy == f"reference.{ADD}"
    assert not fused.site.attributes["inputs"]["x"].startswith("bfloat16[2, 3")


def test_a_flattened_chain_is_found_with_a_token_count_known_only_at_run_time() -> None:
    x, r, w = tensors()
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(r, 1)
    fused = fuse(two_views, x, r, w)
    assert fused.site.strategy == f"reference.{ADD}"
    assert fused.results[1].shape == (6, N)


def test_an_empty_chain_that_changes_shape_with_a_size_known_only_at_run_time_is_refused() -> None:
    x, r, w = torch.zeros(3, 0, 2, N), torch.zeros(3, 0, 2, N), torch.ones(N)
    for tensor in (x, r):
        torch._dynamo.mark_dynamic(tensor, 0)
    fused = fuse(two_views, x, r, w)
    late = next(d for d in fused.site.decisions if d.strategy == f"reference.{ADD}")
    assert late.stage is Stage.REPLACEMENT
    assert "a symbolic size next to a 0" in str(late.reasons[0])


def test_a_chain_that_changes_shape_with_two_sizes_known_only_at_run_time_is_refused() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return norm(torch.tanh(x) + reduce(x.view(-1, N)).view(x.shape), w)

    x, r, w = tensors(torch.bfloat16, 4, 3)
    for dimension in (0, 1):
        torch._dynamo.mark_dynamic(x, dimension)
    fused = fuse(model, x, r, w)
    late = next(d for d in fused.site.decisions if d.strategy == f"reference.{ADD}")
    assert late.stage is Stage.REPLACEMENT
    assert "has 2 symbolic sizes" in str(late.reasons[0])


def per_row_weight(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return norm(total, None) * torch.arange(6.0, dtype=x.dtype).view(2, 3, 1)


def test_a_weight_for_each_row_is_not_a_norm_weight() -> None:
    x, r, w = tensors()
    fused = fuse(per_row_weight, x, r, w)
    assert fused.site.pattern == ADD
    assert "weight" not in fused.site.attributes["inputs"]
    torch.testing.assert_close(fused.results, per_row_weight(x, r, w), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("op", ["max", "min", "avg", "product"])
def test_an_all_reduce_that_does_not_sum_is_a_site_with_a_refusal(op: str) -> None:
    x, r, w = tensors()
    fused = fuse(lambda x, r, w: norm(r + reduce(x, op), w), x, r, w)
    assert fused.site.strategy is None
    assert {str(reason) for d in _refused(fused.site) for reason in d.reasons} == {
        f"the all_reduce takes the {op}, needs sum"
    }
    assert fused.before == fused.after


def coalesced(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    a, b = funcol.all_reduce_coalesced([x * 1, r * 2], "sum", torch.distributed.group.WORLD)
    return norm(a + r, w), norm(b + x, w), b


def test_coalesced_all_reduces_are_sites_each_and_stay_together_in_pure_torch() -> None:
    fused = fuse(coalesced, *tensors())
    assert [(site.pattern, site.strategy) for site in fused.sites] == [(ADD, None)] * 2
    assert "all_reduce_coalesced" in str(fused.sites[0].decisions)
    assert fused.before == fused.after


@pytest.mark.parametrize("limit", [1, 2])
def test_a_backend_may_take_coalesced_all_reduces_apart(monkeypatch: Any, limit: int) -> None:
    own = Strategy(ADD, "own.fused", next(p for p in CORE_PATTERNS if p.name == ADD).function)
    mine = plugin(monkeypatch, "own", fusion_strategies=lambda: [own])
    given = tensors()
    fused = fuse(coalesced, *given, using=registry(mine, config=FusionConfig(limit=limit)))
    assert [site.strategy for site in fused.sites] == ["own.fused", "own.fused" if limit == 2 else None]
    coalescing = torch.ops._c10d_functional.all_reduce_coalesced.default
    assert [row[2] is coalescing for row in fused.after[0][:-1]].count(True) == 2 - limit
    for got, plain in zip(fused.results, coalesced(*given), strict=True):
        torch.testing.assert_close(got, plain, rtol=0.02, atol=0.02)


def test_of_two_norms_of_one_sum_one_is_fused_and_the_other_keeps_its_input() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        total = r + reduce(x)
        return norm(total, w), gemma(total, w)

    given = tensors()
    fused = fuse(model, *given)
    assert fused.site.pattern == ADD
    assert set(fused.site.attributes["live"]) == {"normed", "residual_out"}
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def test_a_parallel_block_that_is_not_merged_is_fused_once_and_its_other_sum_feeds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FUSION_CORE_MERGE", "0")

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return norm(reduce(x) + reduce(r), w)

    given = tensors()
    fused = fuse(model, *given)
    assert [site.pattern for site in fused.sites] == ["all_reduce", ADD]
    passed = next(d for d in fused.sites[0].decisions if d.stage is Stage.REPLACEMENT)
    assert "all_reduce would come after all_reduce_1" in str(passed.reasons[0])
    assert fused.collectives(fused.after[0]) == 2
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def _refused(site: SiteReport) -> list[Any]:
    return [decision for decision in site.decisions if decision.stage is Stage.STRUCTURE]
