"""Where a pattern stands in a graph that was written in plain torch, and why it does not stand elsewhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import _functional_collectives as funcol

from fusion_core import SiteReport, Stage
from tests.support.graphs import fuse

pytestmark = pytest.mark.usefixtures("one_rank")

N = 16
EPS = 1e-5
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(dtype: torch.dtype = torch.bfloat16, *rows: int) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shape = (*(rows or (2, 3)), N)
    x, residual, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape, (N,)))
    return x.to(dtype), residual.to(dtype), weight.to(dtype)


def reduce(x: torch.Tensor, op: str = "sum") -> torch.Tensor:
    return funcol.all_reduce(x * 1, op, torch.distributed.group.WORLD)  # a value of its own, never the input itself


def norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float = EPS) -> torch.Tensor:
    """As Hugging Face writes it."""
    wide = x.to(torch.float32)
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).type_as(x)


def as_square_over_root(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return w * (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def as_sum_over_n(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (w.float() * (wide * ((wide.square().sum(-1) / N + EPS) ** -0.5).unsqueeze(-1))).to(x.dtype)


def as_torch(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (N,), w, EPS)


def as_double(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return (wide * torch.rsqrt(EPS + wide.pow(2).mean(-1, keepdim=True)) * w).to(x.dtype)


ADD = "all_reduce_add_rms_norm"
PLAIN = "all_reduce_rms_norm"


def add_then(spelling: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        total = r + reduce(x)
        return spelling(total, w), total

    return model


def two_views(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r.view(-1, N) + reduce(x).view(-1, N)
    return norm(total.view(x.shape), w), total


# name -> (model, pattern, live outputs, attributes that differ from the usual)
POSITIVES: dict[str, tuple[Callable[..., Any], str, set[str], dict[str, Any]]] = {
    "first norm, no residual": (lambda x, r, w: norm(reduce(x), w), PLAIN, {"normed"}, {}),
    "first norm, sum is the next residual": (
        lambda x, r, w: (norm(a := reduce(x), w), a + 1),
        PLAIN,
        {"normed", "reduced"},
        {},
    ),
    "residual first": (lambda x, r, w: (norm(s := r + reduce(x), w), s), ADD, {"normed", "residual_out"}, {}),
    "residual last": (lambda x, r, w: (norm(s := reduce(x) + r, w), s), ADD, {"normed", "residual_out"}, {}),
    "waited for twice": (lambda x, r, w: norm(r + funcol.wait_tensor(reduce(x)), w), ADD, {"normed"}, {}),
    "residual dead after the norm": (lambda x, r, w: norm(r + reduce(x), w), ADD, {"normed"}, {}),
    "sum live beside the residual": (
        lambda x, r, w: (norm(s := r + (a := reduce(x)), w), s, a.view(-1)),
        ADD,
        {"normed", "residual_out", "reduced"},
        {},
    ),
    "norm dead": (lambda x, r, w: r + reduce(x), "all_reduce", {"reduced"}, {}),
    "no weight": (lambda x, r, w: norm(r + reduce(x), None), ADD, {"normed"}, {}),
    "Gemma": (add_then(gemma), ADD, {"normed", "residual_out"}, {"weight_bias": 1.0}),
    "x*x and a root below": (add_then(as_square_over_root), ADD, {"normed", "residual_out"}, {}),
    "a sum over n to the power -0.5": (add_then(as_sum_over_n), ADD, {"normed", "residual_out"}, {}),
    "torch.nn.functional.rms_norm": (add_then(as_torch), ADD, {"normed", "residual_out"}, {}),
    "through float64": (add_then(as_double), ADD, {"normed", "residual_out"}, {}),
    "flattened between": (two_views, ADD, {"normed", "residual_out"}, {}),
    "any epsilon": (lambda x, r, w: norm(r + reduce(x), w, 0.03), ADD, {"normed"}, {"eps": 0.03}),
    "float32 weight gives a float32 norm": (
        lambda x, r, w: norm(r + reduce(x), w.float()),
        ADD,
        {"normed"},
        {"norm_dtype": torch.float32},
    ),
    "float32 residual stream": (
        lambda x, r, w: (norm(s := r.float() + reduce(x), w), s),
        ADD,
        {"normed", "residual_out"},
        {},
    ),
    "a cast of the sum used elsewhere": (
        lambda x, r, w: (norm(s := r + reduce(x), w), s.float() * 2),
        ADD,
        {"normed", "residual_out"},
        {},
    ),
}


@pytest.mark.parametrize("name", POSITIVES)
def test_a_chain_is_found_whatever_its_spelling(name: str) -> None:
    model, pattern, live, differing = POSITIVES[name]
    given = tensors()
    fused = fuse(model, *given)
    site = fused.site
    assert (site.pattern, site.strategy) == (pattern, f"reference.{pattern}")
    assert set(site.attributes["live"]) == live
    if "eps" in site.attributes:
        expected = {"eps": EPS, "weight_bias": 0.0, "norm_dtype": None, **differing}
        assert site.attributes["eps"] == pytest.approx(expected.pop("eps"), rel=1e-6)
        assert {key: site.attributes[key] for key in expected} == expected
    wide = model(*(t.double() for t in given))
    plain = model(*given)
    for got, unfused, exact in zip(*map(_flat, (fused.results, plain, wide)), strict=True):
        assert got.dtype == unfused.dtype
        assert got.shape == unfused.shape
        rounding = torch.finfo(got.dtype).eps * exact.abs().max()
        assert (got - exact).abs().max() <= 1.5 * (unfused - exact).abs().max() + rounding


def _flat(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


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
    assert "a symbolic size beside a 0" in str(late.reasons[0])


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


def layer_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    centred = total - total.mean(-1, keepdim=True)
    return w * centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)


def over_rows(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return w * total * torch.rsqrt(total.pow(2).mean(1, keepdim=True) + EPS)


def square_of_rows(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = (r + reduce(x)).view(-1, N)[:1].expand(N, N)
    return total * torch.rsqrt(total.pow(2).mean(-1) + EPS)  # no keepdim: broadcast along the wrong dimension


def dropped_dimension(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = reduce(torch.cat([x.view(-1, N)] * 3)[:N])  # as many rows as columns
    return total * torch.rsqrt(total.pow(2).mean(-1) + EPS)


def saved(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    root = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (total * root).to(x.dtype) * w, root


def per_row_weight(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return norm(total, None) * torch.arange(6.0, dtype=x.dtype).view(2, 3, 1)


def feeds_itself(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = reduce(x)
    return norm(total + torch.tanh(total), w)


# name -> (model, what its reason says, the pattern that stands instead)
NEGATIVES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "LayerNorm": (layer_norm, "needs rms_norm", "all_reduce"),
    "mean over another dimension": (over_rows, "needs rms_norm", "all_reduce"),
    "mean broadcast along the wrong dimension": (dropped_dimension, "needs rms_norm", "all_reduce"),
    "a root that others use": (saved, "rsqrt inside the chain is used by output", "all_reduce"),
    "residual computed from the sum": (feeds_itself, "computed from the all_reduce's result", "all_reduce"),
    "scaled branch": (lambda x, r, w: norm(r + reduce(x) * 0.5, w), "scaled by 0.5", "all_reduce"),
    "scaled residual": (lambda x, r, w: norm(r * 0.5 + reduce(x), w), "scaled by 0.5", "all_reduce"),
    "alpha": (lambda x, r, w: norm(torch.add(r, reduce(x), alpha=2), w), "alpha 2", "all_reduce"),
    "eps outside the root": (
        lambda x, r, w: r * 0 + (a := reduce(x)) * (torch.rsqrt(a.pow(2).mean(-1, keepdim=True)) + EPS),
        "needs rms_norm",
        "all_reduce",
    ),
    "root instead of its inverse": (
        lambda x, r, w: (a := reduce(x)) * torch.sqrt(a.pow(2).mean(-1, keepdim=True) + EPS),
        "needs rms_norm",
        "all_reduce",
    ),
    "mean of absolute values": (
        lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a.abs().mean(-1, keepdim=True) + EPS),
        "needs rms_norm",
        "all_reduce",
    ),
    "mean over a part": (
        lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a[..., : N // 2].pow(2).mean(-1, keepdim=True) + EPS),
        "needs rms_norm",
        "all_reduce",
    ),
    "another tensor is normed": (lambda x, r, w: (reduce(x) * 2, norm(r, w)), "needs rms_norm", "all_reduce"),
    "broadcast residual": (lambda x, r, w: norm(r[:1] + reduce(x), w), "needs add", "all_reduce"),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_what_only_looks_like_the_chain_is_left_alone_with_a_reason(name: str) -> None:
    model, why, stands = NEGATIVES[name]
    given = tensors(torch.float32)
    fused = fuse(model, *given)
    assert fused.site.pattern == stands
    refusals = [str(reason) for decision in _refused(fused.site) for reason in decision.reasons]
    assert any(why in refusal for refusal in refusals), refusals
    for got, plain in zip(_flat(fused.results), _flat(model(*given)), strict=True):
        torch.testing.assert_close(got, plain)


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


def test_a_coalesced_all_reduce_is_a_site_with_a_refusal() -> None:
    x, r, _ = tensors()
    fused = fuse(lambda x, r: funcol.all_reduce_coalesced([x * 1, r * 1], "sum", torch.distributed.group.WORLD), x, r)
    assert fused.site.strategy is None
    assert "coalesced" in str(_refused(fused.site)[0].reasons[0])


def test_of_two_norms_of_one_sum_one_is_fused_and_the_other_keeps_its_input() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        total = r + reduce(x)
        return norm(total, w), gemma(total, w)

    given = tensors()
    fused = fuse(model, *given)
    assert fused.site.pattern == ADD
    assert set(fused.site.attributes["live"]) == {"normed", "residual_out"}
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def test_a_parallel_block_is_fused_once_and_its_other_sum_feeds_it() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return norm(reduce(x) + reduce(r), w)

    given = tensors()
    fused = fuse(model, *given)
    assert [site.pattern for site in fused.sites] == [ADD, "all_reduce"]
    taken = next(d for d in fused.sites[1].decisions if d.stage is Stage.REPLACEMENT)
    assert "part of the site at all_reduce" in str(taken.reasons[0])
    assert fused.collectives(fused.after[0]) == 2
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def _refused(site: SiteReport) -> list[Any]:
    return [decision for decision in site.decisions if decision.stage is Stage.STRUCTURE]
