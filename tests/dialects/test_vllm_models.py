"""The models of vLLM's own test of its pass, ``tests/compile/passes/distributed/test_fusion_all_reduce.py``.

Four all_reduces each: one before a plain norm, three before an add and a norm, the last residual unused.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_core import Registry
from fusion_core.vocabulary.fp4 import dequantize_nvfp4
from tests.dialects.vllm_operators import FP8, fp4_buffers
from tests.support.graphs import fuse

pytestmark = pytest.mark.usefixtures("vllm")

TOKENS, HIDDEN, EPS = 64, 128, 1e-6
PLAIN, ADD = "all_reduce_rms_norm", "all_reduce_add_rms_norm"
c, ir, vllm = torch.ops._C, torch.ops.vllm_ir, torch.ops.vllm


def all_reduce(x: Tensor) -> Tensor:
    return vllm.all_reduce(x, "tp:0")


class Model(torch.nn.Module):
    """relu, then four times all_reduce, norm and a linear layer of the quantised norm."""

    def __init__(
        self,
        linear: Callable[..., Tensor],
        *,
        is_gemma: bool = False,
        in_place: bool = False,
        indexers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.linear = linear
        self.is_gemma = is_gemma
        self.in_place = in_place
        self.indexers = indexers
        norms = [random(HIDDEN) * 0.1 + (0 if is_gemma else 1) for _ in range(4)]
        self.norms = torch.nn.ParameterList([norm.bfloat16() for norm in norms])
        weights = [random(HIDDEN, HIDDEN) / HIDDEN**0.5 for _ in range(3)]
        self.weights = torch.nn.ParameterList([weight.bfloat16() for weight in weights])
        self.indexer = torch.nn.Parameter((random(8, HIDDEN) / HIDDEN**0.5).bfloat16())

    def weight(self, index: int) -> Tensor:
        return self.norms[index].float() + 1.0 if self.is_gemma else self.norms[index]

    def norm(self, index: int, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        if self.in_place:
            c.fused_add_rms_norm(x, residual, self.weight(index), EPS)
            return x, residual
        return ir.fused_add_rms_norm(x, residual, self.weight(index), EPS)

    def forward(self, x: Tensor) -> Any:
        z = torch.relu(x)
        residual = all_reduce(z)
        y = ir.rms_norm(residual, self.weight(0), EPS)
        for index in (1, 2, 3):
            z = all_reduce(self.linear(self, y, self.weights[index - 1], index))
            y, residual = self.norm(index, z, residual)
        return self.linear(self, y, None, 4)


def no_quantisation(model: Model, y: Tensor, weight: Tensor | None, index: int) -> Tensor:
    return y if weight is None else torch.mm(y, weight)


def multiply(y: Tensor, weight: Tensor | None) -> Tensor:
    return y if weight is None else torch.mm(y.bfloat16(), weight)


def static_fp8(model: Model, y: Tensor, weight: Tensor | None, index: int) -> Tensor:
    scale = torch.full((1,), 0.01)
    q = torch.empty_like(y, dtype=FP8)
    c.static_scaled_fp8_quant(q, y, scale)
    return multiply(q.float() * scale, weight)


def nvfp4(model: Model, y: Tensor, weight: Tensor | None, index: int) -> Tensor:
    multiplier = torch.full((1,), 448 * 6 / 4.0)
    packed, scale = fp4_buffers(y)
    c.scaled_fp4_quant.out(y, multiplier, True, output=packed, output_scale=scale)
    return multiply(dequantize_nvfp4(packed, scale.view(FP8), multiplier), weight)


def group_fp8(model: Model, y: Tensor, weight: Tensor | None, index: int) -> Tensor:
    q, scale = vllm.triton_per_token_group_quant_fp8(y, 128)
    result = multiply(q.float() * scale, weight)
    if index in model.indexers:
        result = result + vllm.rocm_unquantized_gemm(y, model.indexer).sum(-1, keepdim=True).to(result.dtype)
    return result


# name -> (model, suffix of the patterns, weight_bias, sites whose norm is live too)
MODELS: dict[str, tuple[Model, str, float, tuple[int, ...]]] = {
    "AR+RMS": (Model(no_quantisation), "", 0.0, (0, 1, 2, 3)),
    "AR+RMS with _C's operator": (Model(no_quantisation, in_place=True), "", 0.0, (0, 1, 2, 3)),
    "AR+Gemma RMS": (Model(no_quantisation, is_gemma=True), "", 1.0, (0, 1, 2, 3)),
    "AR+RMS+static FP8": (Model(static_fp8), "_static_fp8", 0.0, ()),
    "AR+Gemma RMS+static FP8, which vLLM leaves unfused": (Model(static_fp8, is_gemma=True), "_static_fp8", 1.0, ()),
    "AR+RMS+NVFP4": (Model(nvfp4), "_nvfp4", 0.0, ()),
    "AR+RMS+group FP8, twice with an indexer": (Model(group_fp8, indexers=(2, 3)), "_group_fp8", 0.0, (1, 2)),
    "AR+Gemma RMS+group FP8, twice with an indexer": (
        Model(group_fp8, is_gemma=True, indexers=(2, 3)), "_group_fp8", 1.0, (1, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_all_four_places_of_a_model_of_vllm_are_fused(name: str, own: Registry) -> None:
    model, suffix, bias, normed = MODELS[name]
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        plain = model(x)
        fused = fuse(model, x, using=own)
    expected = [f"{PLAIN}{suffix}", *[f"{ADD}{suffix}"] * 3]
    assert [(site.pattern, site.strategy) for site in fused.sites] == [(each, f"own.{each}") for each in expected]
    assert [(site.attributes["eps"], site.attributes["weight_bias"]) for site in fused.sites] == [(EPS, bias)] * 4
    assert tuple(n for n, site in enumerate(fused.sites) if "normed" in site.attributes["live"]) == normed
    assert "residual_out" not in fused.sites[3].attributes["live"]
    theirs = ("vllm.all_reduce", "vllm_ir.", "_C.", "auto_functionalized", "_quant_fp8")
    assert not [target for target in fused.targets() if any(each in str(target) for each in theirs)]
    exact = in_float64(model, x)
    assert (fused.results - exact).norm() <= 1.2 * (plain - exact).norm() + 0.01 * exact.norm()


def in_float64(model: Model, x: Tensor) -> Tensor:
    """The model without any rounding or quantisation."""
    weights, indexer = [weight.double() for weight in model.weights], model.indexer.double()

    def norm(index: int, total: Tensor) -> Tensor:
        weight = model.norms[index].double() + model.is_gemma
        return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * weight

    def linear(y: Tensor, index: int) -> Tensor:
        result = y @ weights[index - 1] if index < 4 else y
        return result + (y @ indexer.t()).sum(-1, keepdim=True) if index in model.indexers else result

    with torch.no_grad():
        residual = torch.relu(x.double())
        y = norm(0, residual)
        for index in (1, 2, 3):
            residual = residual + linear(y, index)
            y = norm(index, residual)
        return linear(y, 4)
