"""Models of one all_reduce and one of vLLM's operators behind it, and what stands there."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dialects.vllm_groups import HANDLE
from tests.dialects.vllm_operators import FP8, fp4_buffers

TOKENS, N = 6, 256
EPS = 3e-5
c, ir, vllm = torch.ops._C, torch.ops.vllm_ir, torch.ops.vllm

PLAIN, ADD = "all_reduce_rms_norm", "all_reduce_add_rms_norm"
Model = Callable[..., Any]


def given(tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """x, residual, weight, a static FP8 scale, a global FP4 scale."""
    generator = torch.Generator().manual_seed(0)
    x, r, w = (torch.randn(shape, generator=generator).bfloat16() for shape in ((tokens, N), (tokens, N), (N,)))
    return x, r, w, torch.tensor([0.02]), torch.tensor([200.0])


def reduce(x: Tensor) -> Tensor:
    return vllm.all_reduce(x * 1, "tp:0")


def normed(x: Tensor, w: Tensor) -> Tensor:
    return ir.rms_norm(x, w, EPS)


def codes_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=FP8)


def ir_norm(x, r, w, s, g):
    a = reduce(x)
    return ir.rms_norm(a, w, EPS), a


def norm_of_shared_memory(x, r, w, s, g):
    a = x * 1
    c.shm_allreduce(HANDLE, a)
    return ir.rms_norm(a, w, EPS), a


def ir_norm_without_weight(x, r, w, s, g):
    return ir.rms_norm(reduce(x), None, EPS)


def ir_add_norm(x, r, w, s, g):
    return ir.fused_add_rms_norm(reduce(x), r, w, EPS)


def ir_add_norm_without_residual_out(x, r, w, s, g):
    return ir.fused_add_rms_norm(reduce(x), r, w, EPS)[0]


def ir_add_norm_of_a_wide_residual(x, r, w, s, g):
    return ir.fused_add_rms_norm(reduce(x), r.float(), w, EPS)


def ir_gemma(x, r, w, s, g):
    return ir.fused_add_rms_norm(reduce(x), r, w.float() + 1.0, EPS)


def c_norm(x, r, w, s, g):
    a = reduce(x)
    out = torch.empty_like(a)
    c.rms_norm(out, a, w, EPS)
    return out, a


def c_add_norm(x, r, w, s, g):
    a, r = reduce(x), r * 1
    c.fused_add_rms_norm(a, r, w, EPS)
    return a, r


def static_fp8(x, r, w, s, g):
    norm, total = ir.fused_add_rms_norm(reduce(x), r, w, EPS)
    out = codes_like(norm)
    c.static_scaled_fp8_quant(out, norm, s)
    return out, total


def static_fp8_in_one_group(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out = codes_like(norm)
    c.static_scaled_fp8_quant(out, norm, s, (-1, -1))
    return out


def static_fnuz(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out = torch.empty_like(norm, dtype=torch.float8_e4m3fnuz)
    c.static_scaled_fp8_quant(out, norm, s)
    return out


def token_fp8(x, r, w, s, g):
    norm, total = ir.fused_add_rms_norm(reduce(x), r, w, EPS)
    out, scale = codes_like(norm), norm.new_empty((norm.shape[0], 1), dtype=torch.float32)
    c.dynamic_per_token_scaled_fp8_quant(out, norm, scale, None)
    return out, scale, norm, total


def group_buffers(norm: Tensor, column_major: bool) -> tuple[Tensor, Tensor]:
    groups = norm.shape[1] // 128
    if column_major:
        return codes_like(norm), norm.new_empty((groups, norm.shape[0]), dtype=torch.float32).permute(-1, -2)
    return codes_like(norm), norm.new_empty((norm.shape[0], groups), dtype=torch.float32)


def group_fp8(column_major: bool, ue8m0: bool) -> Model:
    def model(x, r, w, s, g):
        norm, total = ir.fused_add_rms_norm(reduce(x), r, w, EPS)
        out, scale = group_buffers(norm, column_major)
        c.per_token_group_fp8_quant(norm, out, scale, 128, 1e-10, -448.0, 448.0, ue8m0, column_major, False)
        return out, scale, total

    return model


def group_fp8_packed(x, r, w, s, g):
    norm = normed(reduce(x), w)
    tokens, groups = norm.shape[0], N // 128
    scale = torch.empty_strided(
        (tokens, (groups + 3) // 4), (1, (tokens + 3) // 4 * 4), dtype=torch.int32, device=norm.device
    )
    out = codes_like(norm)
    c.per_token_group_fp8_quant_packed(norm, out, scale, 128, 1e-10, -448.0, 448.0)
    return out, scale


def triton_group_fp8(x, r, w, s, g):
    return vllm.triton_per_token_group_quant_fp8(normed(reduce(x), w), 64)


def aiter_group_fp8(x, r, w, s, g):
    norm, total = ir.fused_add_rms_norm(reduce(x), r, w, EPS)
    return *vllm.rocm_aiter_group_fp8_quant(norm, 128), total


def aiter_token_fp8(x, r, w, s, g):
    return vllm.rocm_aiter_per_token_quant(normed(reduce(x), w), FP8)


def fp4(swizzled: bool) -> Model:
    return lambda x, r, w, s, g: c.scaled_fp4_quant(normed(reduce(x), w), g, swizzled)


def fp4_out(swizzled: bool) -> Model:
    def model(x, r, w, s, g):
        norm, total = ir.fused_add_rms_norm(reduce(x), r, w, EPS)
        out, scale = fp4_buffers(norm, swizzled)
        c.scaled_fp4_quant.out(norm, g, swizzled, output=out, output_scale=scale)
        return out, scale.view(FP8), total

    return model


def norm_static_fp8(x, r, w, s, g):
    a = reduce(x)
    out = codes_like(a)
    c.rms_norm_static_fp8_quant(out, a, w, s, EPS)
    return out, a


def add_norm_static_fp8(x, r, w, s, g):
    a, r = reduce(x), r * 1
    out = codes_like(a)
    c.fused_add_rms_norm_static_fp8_quant(out, a, r, w, s, EPS)
    return out, r


def norm_token_fp8(with_residual: bool) -> Model:
    def model(x, r, w, s, g):
        a, r = reduce(x), r * 1
        out, scale = codes_like(a), a.new_empty((a.shape[0], 1), dtype=torch.float32)
        c.rms_norm_dynamic_per_token_quant(out, a, w, scale, EPS, None, r if with_residual else None)
        return out, scale, r if with_residual else a

    return model


def norm_group_fp8(with_residual: bool, column_major: bool) -> Model:
    def model(x, r, w, s, g):
        a, r = reduce(x), r * 1
        out, scale = group_buffers(a, column_major)
        c.rms_norm_per_block_quant(out, a, w, scale, EPS, None, r if with_residual else None, 128, column_major)
        return out, scale, r if with_residual else a

    return model


@dataclass(frozen=True)
class Case:
    """A model, the pattern that stands there, its live outputs, and the attributes that are not plain."""

    model: Model
    pattern: str
    live: str
    differing: dict[str, Any] = field(default_factory=dict)
    collective: str = "vllm::all_reduce"


FLOAT_GROUPS = {"scale_format": "float32", "min_scale": pytest.approx(1e-10 / 448)}
CASES = {
    "_C::shm_allreduce": Case(norm_of_shared_memory, PLAIN, "normed reduced", collective="_C::shm_allreduce"),
    "_C::rms_norm": Case(c_norm, PLAIN, "normed reduced"),
    "_C::fused_add_rms_norm": Case(c_add_norm, ADD, "normed residual_out"),
    "_C::static_scaled_fp8_quant": Case(static_fp8, f"{ADD}_static_fp8", "quantized residual_out"),
    "_C::static_scaled_fp8_quant (-1, -1)": Case(static_fp8_in_one_group, f"{PLAIN}_static_fp8", "quantized"),
    "_C::static_scaled_fp8_quant e4m3fnuz": Case(
        static_fnuz,
        f"{PLAIN}_static_fp8",
        "quantized",
        {"fp8_dtype": torch.float8_e4m3fnuz, "fp8_max": 224.0},
    ),
    "_C::dynamic_per_token_scaled_fp8_quant": Case(
        token_fp8, f"{ADD}_token_fp8", "quantized scale normed residual_out", {"min_scale": None}
    ),
    "_C::per_token_group_fp8_quant": Case(
        group_fp8(False, False),
        f"{ADD}_group_fp8",
        "quantized scale residual_out",
        {**FLOAT_GROUPS, "scale_layout": "row_major", "group_size": 128},
    ),
    "_C::per_token_group_fp8_quant column-major": Case(
        group_fp8(True, False),
        f"{ADD}_group_fp8",
        "quantized scale residual_out",
        {**FLOAT_GROUPS, "scale_layout": "column_major"},
    ),
    "_C::per_token_group_fp8_quant UE8M0": Case(
        group_fp8(True, True),
        f"{ADD}_group_fp8",
        "quantized scale residual_out",
        {"scale_format": "ue8m0", "min_scale": None, "scale_layout": "column_major"},
    ),
    "_C::per_token_group_fp8_quant_packed": Case(
        group_fp8_packed,
        f"{PLAIN}_group_fp8",
        "quantized scale",
        {"scale_format": "ue8m0_packed", "min_scale": None, "scale_layout": "row_major"},
    ),
    "_C::scaled_fp4_quant.out": Case(
        fp4_out(True), f"{ADD}_nvfp4", "quantized scale residual_out", {"scale_layout": "swizzled_128x4"}
    ),
    "_C::scaled_fp4_quant.out linear": Case(
        fp4_out(False), f"{ADD}_nvfp4", "quantized scale residual_out", {"scale_layout": "linear"}
    ),
    "_C::rms_norm_static_fp8_quant": Case(norm_static_fp8, f"{PLAIN}_static_fp8", "quantized reduced"),
    "_C::fused_add_rms_norm_static_fp8_quant": Case(add_norm_static_fp8, f"{ADD}_static_fp8", "quantized residual_out"),
    "_C::rms_norm_dynamic_per_token_quant": Case(
        norm_token_fp8(False), f"{PLAIN}_token_fp8", "quantized scale reduced"
    ),
    "_C::rms_norm_dynamic_per_token_quant residual": Case(
        norm_token_fp8(True), f"{ADD}_token_fp8", "quantized scale residual_out", {"norm_of_unrounded_sum": True}
    ),
    "_C::rms_norm_per_block_quant": Case(
        norm_group_fp8(False, False),
        f"{PLAIN}_group_fp8",
        "quantized scale reduced",
        {"min_scale": None, "scale_layout": "row_major", "group_size": 128},
    ),
    "_C::rms_norm_per_block_quant residual column-major": Case(
        norm_group_fp8(True, True),
        f"{ADD}_group_fp8",
        "quantized scale residual_out",
        {"min_scale": None, "scale_layout": "column_major"},
    ),
}
FUNCTIONAL = {
    "vllm::all_reduce": Case(lambda x, r, w, s, g: reduce(x) * 2, "all_reduce", "reduced"),
    "vllm_ir::rms_norm": Case(ir_norm, PLAIN, "normed reduced", {"weight_after_cast": True}),
    "vllm_ir::rms_norm without weight": Case(ir_norm_without_weight, PLAIN, "normed"),
    "vllm_ir::fused_add_rms_norm": Case(
        ir_add_norm, ADD, "normed residual_out", {"weight_after_cast": True, "norm_of_unrounded_sum": True}
    ),
    "vllm_ir::fused_add_rms_norm first result alone": Case(ir_add_norm_without_residual_out, ADD, "normed"),
    "vllm_ir::fused_add_rms_norm float32 residual": Case(
        ir_add_norm_of_a_wide_residual, ADD, "normed residual_out", {"residual_dtype": torch.bfloat16}
    ),
    "vllm_ir::fused_add_rms_norm Gemma": Case(ir_gemma, ADD, "normed residual_out", {"weight_bias": 1.0}),
    "vllm::triton_per_token_group_quant_fp8": Case(
        triton_group_fp8,
        f"{PLAIN}_group_fp8",
        "quantized scale",
        {**FLOAT_GROUPS, "scale_layout": "row_major", "group_size": 64},
    ),
    "vllm::rocm_aiter_group_fp8_quant": Case(
        aiter_group_fp8, f"{ADD}_group_fp8", "quantized scale residual_out", {**FLOAT_GROUPS, "group_size": 128}
    ),
    "vllm::rocm_aiter_per_token_quant": Case(
        aiter_token_fp8, f"{PLAIN}_token_fp8", "quantized scale", {"min_scale": 0.0, "fp8_dtype": FP8}
    ),
    "_C::scaled_fp4_quant": Case(fp4(True), f"{PLAIN}_nvfp4", "quantized scale", {"scale_layout": "swizzled_128x4"}),
    "_C::scaled_fp4_quant linear": Case(fp4(False), f"{PLAIN}_nvfp4", "quantized scale", {"scale_layout": "linear"}),
}
