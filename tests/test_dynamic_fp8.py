"""Dynamic FP8 through all of Inductor: its definition makes constants, and was once never placed in a real compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fusion_core
from fusion_core import FusionPass
from fusion_core.vocabulary.fp8 import dequantize_fp8
from tests.corpus.judging import in_float64
from tests.properties.jobs import excess

pytestmark = pytest.mark.usefixtures("one_rank")

H = 256
FP8 = torch.float8_e4m3fn


def normed(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x.clone()
    dist.all_reduce(y)
    h = y + r
    g = h.float()
    return w * (g * torch.rsqrt(g.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype), h


def of_tokens(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, h = normed(x, r, w)
    n = n.float()
    s = n.abs().amax(-1, keepdim=True) / 448
    return (n / s).clamp(-448, 448).to(FP8).view(torch.uint8), s, h


def of_groups(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, h = normed(x, r, w)
    g = n.float().view(-1, H // 128, 128)
    s = g.abs().amax(-1, keepdim=True) / 448
    return (g / s).clamp(-448, 448).to(FP8).view(n.shape).view(torch.uint8), s.squeeze(-1), h


def both(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> Any:
    return of_tokens(x, r, w), of_groups(r, x, v)


def given() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, H), (5, H), (H,), (H,))
    return tuple(torch.randn(size, generator=generator).bfloat16() for size in sizes)


def through_the_backend(**kwargs: Any) -> Any:
    return torch.compile(both, backend="fusion_core", fullgraph=True, **kwargs)


def by_hand() -> Any:
    return torch.compile(both, options={"post_grad_custom_post_pass": FusionPass()}, fullgraph=True)


@pytest.mark.parametrize(
    ("compiled", "around"),
    [
        pytest.param(through_the_backend, torch.enable_grad, id="gradients"),
        pytest.param(lambda: through_the_backend(dynamic=True), torch.inference_mode, id="inference, dynamic"),
        pytest.param(by_hand, torch.no_grad, id="a pass set by hand"),
    ],
)
def test_both_are_placed_and_are_as_near_to_float64(compiled: Callable[[], Any], around: Callable[[], Any]) -> None:
    torch._dynamo.reset()
    with around(), torch._inductor.config.patch(fx_graph_cache=False):
        results = compiled()(*given())
    report = fusion_core.last_report()
    assert report is not None
    assert [site.strategy for site in report.sites] == [
        "reference.all_reduce_add_rms_norm_token_fp8",
        "reference.all_reduce_add_rms_norm_group_fp8",
    ], str(report)
    x, r, w, v = given()
    oracles = [in_float64(normed, args) for args in ((x, r, w), (r, x, v))]
    for got, plain, (exact, total), size in zip(results, both(*given()), oracles, (None, 128), strict=True):
        values = [
            dequantize_fp8(codes.view(FP8), scale, group_size=size, dtype=torch.float64)
            for codes, scale, _ in (got, plain)
        ]
        assert excess(*values, exact, torch.bfloat16) <= 1
        assert excess(got[2], plain[2], total, torch.bfloat16) <= 1
