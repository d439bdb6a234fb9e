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


class Layers(torch.nn.Module):
    """Weights are parameters, as in models: with ``dynamic=True`` too, the hidden size is then a number."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w, self.v = (torch.nn.Buffer(torch.randn(H, generator=generator).bfloat16()) for _ in range(2))

    def forward(self, x: Tensor, r: Tensor) -> Any:
        return of_tokens(x, r, self.w), of_groups(r, x, self.v)


def given() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(5, H, generator=generator).bfloat16() for _ in range(2))
    return x, r


def through_the_backend(layers: Layers, **kwargs: Any) -> Any:
    return torch.compile(layers, backend="fusion_core", fullgraph=True, **kwargs)


def by_hand(layers: Layers) -> Any:
    return torch.compile(layers, options={"post_grad_custom_post_pass": FusionPass()}, fullgraph=True)


@pytest.mark.parametrize(
    ("compiled", "around"),
    [
        pytest.param(through_the_backend, torch.enable_grad, id="gradients"),
        pytest.param(
            lambda layers: through_the_backend(layers, dynamic=True), torch.inference_mode, id="inference, dynamic"
        ),
        pytest.param(by_hand, torch.no_grad, id="a pass set by hand"),
    ],
)
def test_both_are_placed_and_are_as_near_to_float64(
    compiled: Callable[[Layers], Any], around: Callable[[], Any]
) -> None:
    torch._dynamo.reset()
    layers = Layers()
    with around(), torch._inductor.config.patch(fx_graph_cache=False):
        results = compiled(layers)(*given())
    report = fusion_core.last_report()
    assert report is not None
    assert [site.strategy for site in report.sites] == [
        "reference.all_reduce_add_rms_norm_token_fp8",
        "reference.all_reduce_add_rms_norm_group_fp8",
    ], str(report)
    x, r = given()
    oracles = [in_float64(normed, args) for args in ((x, r, layers.w), (r, x, layers.v))]
    for got, plain, (exact, total), size in zip(results, layers(*given()), oracles, (None, 128), strict=True):
        values = [
            dequantize_fp8(codes.view(FP8), scale, group_size=size, dtype=torch.float64)
            for codes, scale, _ in (got, plain)
        ]
        assert excess(*values, exact, torch.bfloat16) <= 1
        assert excess(got[2], plain[2], total, torch.bfloat16) <= 1
