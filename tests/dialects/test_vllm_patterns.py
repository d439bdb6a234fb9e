"""The eleven patterns of vLLM's ``allreduce_rms_fusion.py``, traced as vLLM traces them: each is one of ours.

https://docs.vllm.ai/en/latest/api/vllm/compilation/passes/fusion/allreduce_rms_fusion
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_core import FusionPass, Registry
from tests.dialects.agreement import assert_agree
from tests.dialects.vllm_operators import FP8

pytestmark = pytest.mark.usefixtures("vllm")

PLAIN, ADD = "all_reduce_rms_norm", "all_reduce_add_rms_norm"
N = 256
ir = torch.ops.vllm_ir
STATIC_FP4_QUANT_OP = torch.ops._C.scaled_fp4_quant.out


class Row:
    """One traced graph, and what the pass made of it."""

    def __init__(self, pattern: Callable[..., Any], inputs: list[Tensor], own: Registry) -> None:
        self.plain = pattern(*inputs)
        self.traced = make_fx(pattern, tracing_mode="fake")(*inputs)
        self.traced.graph.eliminate_dead_code()
        (x,) = (node for node in self.traced.graph.nodes if node.target is torch.ops.vllm.all_reduce.default)
        with x.meta["val"].fake_mode:  # as Inductor runs its passes
            self.report = FusionPass(registry=own).run(self.traced.graph)
        self.traced.recompile()
        self.results = self.traced(*inputs)

    @property
    def graph(self) -> fx.Graph:
        return self.traced.graph


def tensor_model_parallel_all_reduce(input_: Tensor) -> Tensor:
    return torch.ops.vllm.all_reduce(input_, "tp:0")


def static_quant_matcher(input: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``MatcherQuantFP8(kFp8StaticTensorSym)`` with the custom operator on."""
    result = torch.empty(input.shape, device=input.device, dtype=FP8)
    _, result = auto_functionalized(
        torch.ops._C.static_scaled_fp8_quant.default, result=result, input=input, scale=scale, group_shape=None
    )
    return result, scale


def triton_quant_matcher(input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm.triton_per_token_group_quant_fp8(input, 128)


def aiter_quant_matcher(input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.vllm.rocm_aiter_group_fp8_quant(input, 128)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


RESIDUAL, INPUT, WEIGHT = random(5, N), random(5, N) * 2, random(N)
SCALE, GLOBAL_SCALE = torch.tensor([0.02]), torch.tensor([[200.0]])
EPS = 1e-6


# ---- as vLLM's page has them


def aiter_add_group_quant(quant_matcher: Any) -> Any:
    def _pattern(residual, input, weight):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms, residual_out = ir.fused_add_rms_norm(allreduce_output, residual, weight, EPS)
        quant, scale = quant_matcher(rms)
        return quant, scale, residual_out

    return _pattern, [RESIDUAL, INPUT, WEIGHT]


def aiter_add_group_quant_with_indexer(quant_matcher: Any) -> Any:
    def _pattern(residual, input_, norm_weight, indexer_weight):
        ar_out = tensor_model_parallel_all_reduce(input_)
        rms, res_out = ir.fused_add_rms_norm(ar_out, residual, norm_weight, EPS)
        q, s = quant_matcher(rms)
        idx = torch.ops.vllm.rocm_unquantized_gemm(rms, indexer_weight)
        return q, s, res_out, idx, rms

    return _pattern, [RESIDUAL, INPUT, WEIGHT, random(8, N) / 16]


def aiter_group_quant(quant_matcher: Any) -> Any:
    def _pattern(input, weight):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms = ir.rms_norm(allreduce_output, weight, EPS)
        quant, scale = quant_matcher(rms)
        return quant, scale

    return _pattern, [INPUT, WEIGHT]


def add_gemma(first_only: bool) -> Any:
    def pattern(residual, input, weight):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms, residual = ir.fused_add_rms_norm(allreduce_output, residual, weight.float() + 1.0, EPS)
        return rms if first_only else (rms, residual)

    return pattern, [RESIDUAL, INPUT, WEIGHT]


def add_norm(first_only: bool) -> Any:
    def pattern(residual, input, weight):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms, residual = ir.fused_add_rms_norm(allreduce_output, residual, weight, EPS)
        return rms if first_only else (rms, residual)

    return pattern, [RESIDUAL, INPUT, WEIGHT]


def add_static_quant() -> Any:
    def pattern(residual, input, weight, scale):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms, res = ir.fused_add_rms_norm(allreduce_output, residual, weight, EPS)
        quant, _ = static_quant_matcher(rms, scale)
        return quant, res

    return pattern, [RESIDUAL, INPUT, WEIGHT, SCALE]


def add_nvfp4() -> Any:
    def pattern(quant_result, residual, input, output_scale, weight, input_global_scale):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms, residual = ir.fused_add_rms_norm(allreduce_output, residual, weight, EPS)
        quant_out_tuple = auto_functionalized(
            STATIC_FP4_QUANT_OP,
            input=rms,
            input_scale=input_global_scale,
            is_sf_swizzled_layout=True,
            output=quant_result,
            output_scale=output_scale,
        )
        # quant_out, allreduce_output, output_scale
        return quant_out_tuple[1], residual, quant_out_tuple[2]

    quant_result, output_scale = torch.zeros(5, N // 2, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.int32)
    return pattern, [quant_result, RESIDUAL, INPUT, output_scale, WEIGHT, GLOBAL_SCALE]


def static_quant() -> Any:
    def pattern(input, weight, scale):
        all_reduce = tensor_model_parallel_all_reduce(input)
        rms = ir.rms_norm(all_reduce, weight, EPS)
        quant, _ = static_quant_matcher(rms, scale)
        return quant, all_reduce

    return pattern, [INPUT, WEIGHT, SCALE]


def nvfp4() -> Any:
    def pattern(input, quant_result, weight, input_global_scale, output_scale):
        all_reduce = tensor_model_parallel_all_reduce(input)
        rms = ir.rms_norm(all_reduce, weight, EPS)
        quant_out_tuple = auto_functionalized(
            STATIC_FP4_QUANT_OP,
            input=rms,
            input_scale=input_global_scale,
            is_sf_swizzled_layout=True,
            output=quant_result,
            output_scale=output_scale,
        )
        # quant_out, allreduce_output, output_scale
        return quant_out_tuple[1], all_reduce, quant_out_tuple[2]

    # the page traces it with an input of three dimensions, which it quantises as (tokens, n)
    quant_result, output_scale = torch.zeros(5, N // 2, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.int32)
    return pattern, [INPUT.unsqueeze(0), quant_result, WEIGHT, GLOBAL_SCALE, output_scale]


def gemma() -> Any:
    def pattern(input, weight):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms = ir.rms_norm(allreduce_output, weight.float() + 1.0, EPS)
        return rms, allreduce_output

    return pattern, [INPUT, WEIGHT]


def norm() -> Any:
    def pattern(input, weight):
        allreduce_output = tensor_model_parallel_all_reduce(input)
        rms = ir.rms_norm(allreduce_output, weight, EPS)
        return rms, allreduce_output

    return pattern, [INPUT, WEIGHT]


STATIC = {"fp8_dtype": FP8, "fp8_max": None}
GROUPS = {"group_size": 128, "fp8_dtype": FP8, "fp8_max": None, "scale_format": "float32", "scale_layout": "row_major"}
FP4 = {"scale_layout": "swizzled_128x4"}
GEMMA = {"weight_bias": 1.0}

# class -> (its pattern and inputs, our pattern, live outputs, attributes beside eps and weight_bias 0)
ROWS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "AiterAllreduceFusedAddRMSNormGroupQuantFP8Pattern": (
        aiter_add_group_quant(triton_quant_matcher), f"{ADD}_group_fp8", "quantized scale residual_out", GROUPS,
    ),
    "AiterAllreduceFusedAddRMSNormGroupQuantFP8Pattern, AITER's quantiser": (
        aiter_add_group_quant(aiter_quant_matcher), f"{ADD}_group_fp8", "quantized scale residual_out", GROUPS,
    ),
    "AiterAllreduceFusedAddRMSNormGroupQuantWithIndexerPattern": (
        aiter_add_group_quant_with_indexer(triton_quant_matcher),
        f"{ADD}_group_fp8", "quantized scale normed residual_out", GROUPS,
    ),
    "AiterAllreduceFusedAddRMSNormGroupQuantWithIndexerPattern, AITER's quantiser": (
        aiter_add_group_quant_with_indexer(aiter_quant_matcher),
        f"{ADD}_group_fp8", "quantized scale normed residual_out", GROUPS,
    ),
    "AiterAllreduceFusedRMSNormGroupQuantFP8Pattern": (
        aiter_group_quant(triton_quant_matcher), f"{PLAIN}_group_fp8", "quantized scale", GROUPS,
    ),
    "AiterAllreduceFusedRMSNormGroupQuantFP8Pattern, AITER's quantiser": (
        aiter_group_quant(aiter_quant_matcher), f"{PLAIN}_group_fp8", "quantized scale", GROUPS,
    ),
    "AllReduceFusedAddGemmaRMSNormPattern": (add_gemma(False), ADD, "normed residual_out", GEMMA),
    "AllReduceFusedAddGemmaRMSNormPattern, first return only": (add_gemma(True), ADD, "normed", GEMMA),
    "AllReduceFusedAddRMSNormPattern": (add_norm(False), ADD, "normed residual_out", {}),
    "AllReduceFusedAddRMSNormPattern, first return only": (add_norm(True), ADD, "normed", {}),
    "AllReduceFusedAddRMSNormStaticQuantFP8Pattern": (
        add_static_quant(), f"{ADD}_static_fp8", "quantized residual_out", STATIC,
    ),
    "AllReduceFusedAddRMSNormStaticQuantNVFP4Pattern": (
        add_nvfp4(), f"{ADD}_nvfp4", "quantized scale residual_out", FP4,
    ),
    "AllReduceFusedRMSNormStaticQuantFP8Pattern": (static_quant(), f"{PLAIN}_static_fp8", "quantized reduced", STATIC),
    "AllReduceFusedRMSNormStaticQuantNVFP4Pattern": (nvfp4(), f"{PLAIN}_nvfp4", "quantized scale reduced", FP4),
    "AllReduceGemmaRMSNormPattern": (gemma(), PLAIN, "normed reduced", GEMMA),
    "AllReduceRMSNormPattern": (norm(), PLAIN, "normed reduced", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_pattern_of_vllm_is_one_of_ours(name: str, own: Registry) -> None:
    (pattern, inputs), ours, live, differing = ROWS[name]
    row = Row(pattern, inputs, own)
    (site,) = row.report.sites
    assert (site.pattern, site.strategy) == (ours, f"own.{ours}")
    assert set(site.attributes["live"]) == set(live.split())
    expected = {"eps": EPS, "weight_bias": 0.0, "norm_dtype": None, "group": "0", **differing}
    assert {key: site.attributes[key] for key in expected} == expected
    assert site.attributes["inputs"]["weight"] == f"bfloat16[{N}]"  # Gemma's too: the stored one, not weight + 1
    left = {str(node.target) for node in row.graph.nodes if node.op == "call_function"}
    kept = {"vllm.rocm_unquantized_gemm.default"} if "Indexer" in name else set()
    assert {target for target in left if target.startswith(("vllm", "_C", "auto_functionalized"))} == kept
    if "Indexer" in name:  # a matrix product sums the norm's roundings
        torch.testing.assert_close(row.results[3], row.plain[3], rtol=0.05, atol=0.05)
    for index, (fused, plain) in enumerate(zip(*map(as_tuple, (row.results, row.plain)), strict=True)):
        if not ("Indexer" in name and index == 3):
            assert_agree(fused, plain)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_all_eleven_classes_are_here() -> None:
    assert len({name.partition(",")[0] for name in ROWS}) == 11
