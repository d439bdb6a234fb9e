"""torchao's FP8 quantisation of activations as torchao's own code traces it: plain torch, and read as such."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchao.quantization.quant_api
from torch import Tensor, nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_
from torchao.quantization.granularity import PerBlock
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

from fusion_core.vocabulary.fp8 import dequantize_fp8
from tests.corpus.case import ADD, EPS, FP8, norm, reduce
from tests.support.graphs import Fused, fuse

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    # Dynamo warns of what it does itself, where it traces torchao's autograd function
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

N = 256
TOKEN, GROUP = f"{ADD}_token_fp8", f"{ADD}_group_fp8"


def tensors(*rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, r, w = (torch.randn(shape, generator=generator) for shape in ((*rows, N), (*rows, N), (N,)))
    return x.bfloat16(), r.bfloat16(), w.bfloat16()


def chain(granularity: Any) -> Callable[..., tuple[Tensor, ...]]:
    """A norm behind an all_reduce, quantised by torchao."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x)
        found = Float8Tensor.from_hp(norm(total, w), FP8, granularity, kernel_preference=KernelPreference.TORCH)
        return found.qdata, found.scale, total

    return model


@pytest.mark.parametrize(
    ("granularity", "pattern", "group_size"), [(PerRow(), TOKEN, None), (PerBlock((1, 128)), GROUP, 128)], ids=str
)
def test_a_scale_for_each_row_or_block(granularity: Any, pattern: str, group_size: int | None) -> None:
    given = tensors(4)
    fused = fuse(chain(granularity), *given)
    assert fused.site.strategy == f"reference.{pattern}"
    assert set(fused.site.attributes["live"]) == {"quantized", "scale", "residual_out"}
    assert fused.site.attributes["min_scale"] == 0.0  # torchao has no least scale here
    assert fused.site.attributes.get("group_size") == group_size
    exact = norm(given[1].double() + given[0].double(), given[2].double(), EPS)
    (codes, scale, _), plain = fused.results, chain(granularity)(*given)
    assert (codes.shape, scale.shape, scale.dtype) == (plain[0].shape, plain[1].shape, plain[1].dtype)
    distance, unfused = (
        (dequantize_fp8(q, s, dtype=torch.float64) - exact).abs().max() for q, s in ((codes, scale), plain[:2])
    )
    assert distance <= 1.05 * unfused


def test_one_scale_for_the_tensor_is_left_with_a_reason() -> None:
    fused = fuse(chain(PerTensor()), *tensors(4))
    assert fused.site.pattern == ADD
    (reason,) = next(d for d in fused.site.decisions if d.pattern == TOKEN).reasons
    assert "whole tensor" in str(reason)


class Attention(nn.Module):
    """What feeds three projections: torchao quantises the same norm in each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(N, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(N, n, bias=False) for n in (N, 64, 64))

    def forward(self, x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        total = r + reduce(x)
        normed = self.norm(total)
        return self.q(normed), self.k(normed), self.v(normed), total


@pytest.mark.parametrize("rows", [(4,), (2, 2)], ids=["tokens", "batch and tokens"])
def test_projections_that_quantise_one_norm_share_what_is_fused(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...]
) -> None:
    # torchao asks for a GPU with FP8 matrix units; the same code runs here, with slower multiplications
    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda *args: None)
    torch.manual_seed(0)
    model = Attention().bfloat16().eval()
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    x, r, _ = tensors(*rows)
    with torch.no_grad():
        fused = fuse(model, x, r)
        plain = model(x, r)
    assert fused.site.strategy == f"reference.{TOKEN}"
    assert set(fused.site.attributes["live"]) == {"quantized", "scale", "residual_out"}
    assert _casts(fused) == 1
    for got, wanted in zip(fused.results, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)


def _casts(fused: Fused) -> int:
    return sum(
        isinstance(value := node.meta.get("val"), torch.Tensor) and value.dtype == FP8 and "convert" in str(node.target)
        for node in fused.graphs[0].nodes
    )
