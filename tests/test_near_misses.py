"""The nearest cause at each all_reduce, and no other: what a report says where no longer pattern stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusion_core
from fusion_core import SiteReport
from tests.corpus.case import ADD, ADD_LAYER, EPS, PLAIN, N, norm, reduce
from tests.support.graphs import fuse
from tests.test_matching import tensors

pytestmark = pytest.mark.usefixtures("one_rank")

WIDE = torch.eye(N, dtype=torch.bfloat16)
STATIC = torch.tensor(0.05)

Model = Callable[[Tensor, Tensor, Tensor], Any]


def said(site: SiteReport) -> list[str]:
    """The near misses of a site as a report has them."""
    return [f"{miss.pattern}: {miss.reason}" for miss in site.near_misses]


def layer_norm(h: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(h.float(), (N,), w.float(), eps=EPS).to(h.dtype)


def quantised(h: Tensor) -> Tensor:
    return (h.float() / STATIC).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def layer_norm_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """This all_reduce is projected; the LayerNorm is of another sum, two layers on."""
    h = reduce(x) @ WIDE
    h = r + h
    return layer_norm(h + torch.relu(h) @ WIDE, w)


def layer_norm_of_the_residual_stream(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """The sum is normed whole; the stream goes on to a LayerNorm behind the next sum."""
    h = r + reduce(x)
    h = h + norm(h, w) @ WIDE
    return layer_norm(h, w)


def slice_of_the_stream(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """Matched whole; a part of its own result is cut out."""
    h = r + reduce(x)
    return norm(h, w), h[:, -1], norm(h, w)[:, -1]


def slice_of_a_clamped_sum(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + reduce(x)
    return norm(h.clamp(-100, 100), w), h[:, -1]


def slice_of_a_norm_in_a_graph_with_codes(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """A cast to FP8 elsewhere does not make a near miss of the last token's slice."""
    return norm(r + reduce(x), w)[:, -1], quantised(x)


def two_norms(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + reduce(x)
    return norm(h, w), layer_norm(h, w), h


def scaled_twice(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """Each layer's own cause, in graph order."""
    h = r + reduce(x) * 0.5
    h = h + reduce(norm(h, w)).clamp(-1, 1)
    return norm(h + reduce(layer_norm(h, w)), w)


def dead_end(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return r + reduce(x)


MISSES: dict[str, tuple[Model, list[list[str]]]] = {
    "a LayerNorm later": (
        layer_norm_later,
        [[f"{PLAIN}: all_reduce is followed by mm, needs add, layer_norm or rms_norm of it"]],
    ),
    "a LayerNorm of the residual stream": (layer_norm_of_the_residual_stream, [[]]),
    "a LayerNorm here": (lambda x, r, w: layer_norm(r + reduce(x), w), [[]]),
    "a GroupNorm here": (
        lambda x, r, w: F.group_norm((r + reduce(x)).view(-1, N, 1), 2),
        [[f"{ADD}: var_mean is a variance about the mean over dimensions 2 and 3 of 4, needs the last one"]],
    ),
    "a variance alone": (
        lambda x, r, w: (r + reduce(x)).float().var(-1, correction=0),
        [[f"{ADD}: var is a variance about the mean, as LayerNorm takes it, needs a mean of squares"]],
    ),
    "nearly a LayerNorm": (
        lambda x, r, w: (
            (c := (h := (r + reduce(x)).float()) - h.mean(-1, True)) / (c.square().mean(-1, True).sqrt() + EPS)
        ),
        [[f"{ADD_LAYER}: 1e-05 is added outside the root, needs an epsilon inside it"]],
    ),
    "a bias and nothing more": (
        lambda x, r, w: torch.relu(reduce(x) + w),
        [[f"{ADD}: arg1_1, of shape [16], is broadcast by add, needs the shape [2, 3, 16]"]],
    ),
    "a bias, a residual and the end": (
        lambda x, r, w: r + (reduce(x) + w),
        [[f"{ADD}: the graph ends here, after add, as does the model's code, needs rms_norm of it"]],
    ),
    "a slice of its own result": (slice_of_the_stream, [[]]),
    "a slice beside a clamp": (slice_of_a_clamped_sum, [[f"{ADD}: add is followed by clamp, needs rms_norm of it"]]),
    "a slice of its own norm": (slice_of_a_norm_in_a_graph_with_codes, [[]]),
    "a part of the all_reduce normed beside a whole match": (
        lambda x, r, w: (norm(r + (a := reduce(x)), w), norm(a[:, -1], w), a),
        [[]],
    ),
    "a slice that is normed": (
        lambda x, r, w: norm(reduce(x)[:, -1], w),
        [[f"{PLAIN}: select is a part of wait_tensor, needs the whole"]],
    ),
    "a clamp": (
        lambda x, r, w: norm((r + reduce(x)).clamp(-100, 100), w),
        [[f"{ADD}: add is followed by clamp, needs rms_norm of it"]],
    ),
    "a clamp of the sum alone": (
        lambda x, r, w: norm(r + reduce(x).clamp(-100, 100), w),
        [[f"{PLAIN}: all_reduce is followed by clamp, needs add or rms_norm of it"]],
    ),
    "nan_to_num": (
        lambda x, r, w: norm(torch.nan_to_num(r + reduce(x)), w),
        [[f"{ADD}: add is followed by nan_to_num, needs rms_norm of it"]],
    ),
    "two norms of one sum": (two_norms, [[]]),
    "half a residual": (lambda x, r, w: norm(reduce(x) + 0.5 * r, w), [[]]),
    "half an all_reduce": (
        lambda x, r, w: norm(0.5 * reduce(x) + r, w),
        [[f"{ADD}: the all_reduce's side of add is scaled by 0.5, needs the sum as it is"]],
    ),
    "several layers": (
        scaled_twice,
        [
            [f"{ADD}: the all_reduce's side of add is scaled by 0.5, needs the sum as it is"],
            [f"{PLAIN}: all_reduce is followed by clamp, needs add, layer_norm or rms_norm of it"],
            [],
        ],
    ),
    "the end of the model": (
        dead_end,
        [[f"{ADD}: the graph ends here, after add, as does the model's code, needs rms_norm of it"]],
    ),
    "nothing but the sum": (
        lambda x, r, w: reduce(x),
        [[f"{PLAIN}: the graph ends here, after all_reduce, as does the model's code, needs add or rms_norm of it"]],
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_the_nearest_cause_is_named_and_nothing_else(name: str) -> None:
    model, expected = MISSES[name]
    fused = fuse(model, *tensors())
    assert [said(site) for site in fused.sites] == expected


def test_an_rms_norm_that_is_near_is_no_reason_against_a_layer_norm() -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        h = (r + reduce(x)).float()
        h = h / (h.square().mean(-1, keepdim=True).sqrt() + EPS)
        return layer_norm(h + reduce(h), w)

    first, second = fuse(model, *tensors()).sites
    assert said(first) == [f"{ADD}: 1e-05 is added outside the root, needs an epsilon inside it"]
    (other,) = [decision for decision in first.decisions if decision.pattern == ADD_LAYER]
    assert [str(reason) for reason in other.reasons] == ["add is followed by pow, div, needs layer_norm of it"]
    assert second.pattern == ADD_LAYER


def broken(x: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + reduce(x)
    torch._dynamo.graph_break()
    h = norm(h, w)
    return norm(h + reduce(h), w)


BREAK = (
    f"{ADD}: the graph ends here (graph break), after add, needs rms_norm of it; "
    "Dynamo reports: Call to `torch._dynamo.graph_break()`; TORCH_LOGS=graph_breaks shows where"
)


def test_a_graph_break_behind_an_all_reduce_is_named_by_the_compiled_model() -> None:
    before = len(fusion_core.reports())
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(broken, backend="fusion_core")(*tensors())
    first, second = fusion_core.reports()[before:]
    assert [said(site) for report in (first, second) for site in report.sites] == [[BREAK], []]
    assert f"  {BREAK} (at all_reduce)" in str(first).splitlines()


def test_a_dry_run_says_the_same_and_tells_the_sites_of_both_graphs_apart() -> None:
    with torch.no_grad():
        report = fusion_core.explain(broken, *tensors())
    assert [(site.graph, site.node, said(site)) for site in report.sites] == [
        (1, "all_reduce", [BREAK]),
        (2, "all_reduce", []),
    ]
    lines = str(report).splitlines()
    assert lines[0].endswith(
        "0 of 2 all_reduces would be on a kernel, 2 as before (reference), in 2 graphs, on 1 x cpu"
    )
    assert [line.split("  ")[1] for line in lines[2:4]] == ["graph 1: all_reduce", "graph 2: all_reduce"]
    assert f"  {BREAK} (at graph 1: all_reduce)" in lines


def test_a_pass_that_inductor_runs_by_itself_knows_only_that_the_graph_ends() -> None:
    before = len(fusion_core.reports())
    torch._dynamo.reset()
    options = {"post_grad_custom_post_pass": fusion_core.FusionPass(), "fx_graph_cache": False}
    with torch.no_grad():
        torch.compile(dead_end, fullgraph=True, options=options)(*tensors())
    (report,) = fusion_core.reports()[before:]
    assert [said(site) for site in report.sites] == [[f"{ADD}: the graph ends here, after add, needs rms_norm of it"]]
