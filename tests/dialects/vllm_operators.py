"""vLLM's operators with their real schemas, each implemented in plain torch as vLLM's sources say what it does.

Rounding is where the kernels have it: a norm is rounded to the weight's dtype before the multiplication, and a sum is
normed unrounded by ``vllm_ir`` and by the kernels that quantise dynamically, rounded by the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.dialects.vllm_groups import PARALLEL_STATE

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 224.0}
FP8 = torch.float8_e4m3fn

LIBRARIES = {name: torch.library.Library(name, "FRAGMENT") for name in ("vllm", "vllm_ir", "_C")}


def define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator whose plain torch function is below; it serves as its shape function too."""
    namespace, _, rest = schema.partition("::")
    name = rest.partition("(")[0]
    library = LIBRARIES[namespace]
    library.define(rest)

    def implement(function: Callable[..., Any]) -> Callable[..., Any]:
        library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return implement


# ---- the collective

LIBRARIES["vllm"].define("all_reduce(Tensor tensor, str group_name) -> Tensor")


@torch.library.impl("vllm::all_reduce", "CPU", lib=LIBRARIES["vllm"])
def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    coordinator = sys.modules[PARALLEL_STATE]._groups[group_name]()  # type: ignore[attr-defined]
    reduced = tensor.clone()
    dist.all_reduce(reduced, group=coordinator.device_group)
    return reduced


@torch.library.register_fake("vllm::all_reduce", lib=LIBRARIES["vllm"])
def _(tensor: Tensor, group_name: str) -> Tensor:
    return torch.empty_like(tensor)


@define("_C::shm_allreduce(int handle, Tensor(a!) data) -> ()")
def shm_allreduce(handle: int, data: Tensor) -> None:
    """A CPU build's, in place."""
    groups = [reference() for reference in sys.modules[PARALLEL_STATE]._groups.values()]  # type: ignore[attr-defined]
    (group,) = {g.device_group for g in groups if g.device_communicator.dist_module.handle == handle}
    reduced = torch.ops._c10d_functional.all_reduce(data, "sum", group.group_name)
    data.copy_(torch.ops._c10d_functional.wait_tensor(reduced))


# ---- norms


def normed(wide: Tensor, weight: Tensor | None, epsilon: float, dtype: torch.dtype) -> Tensor:
    """An RMSNorm of float32 values, as vLLM rounds it."""
    result = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if weight is not None:
        result = result.to(weight.dtype) * weight
    return result.to(dtype)


@define("vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")
def ir_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    wide = x.float()
    variance = wide[..., :variance_size].pow(2).mean(-1, keepdim=True)
    result = wide * torch.rsqrt(variance + epsilon)
    return (result if weight is None else result.to(weight.dtype) * weight).to(x.dtype)


@define(
    "vllm_ir::fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, "
    "int? variance_size=None) -> (Tensor, Tensor)"
)
def ir_fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    wide = x.float() + x_residual.float()
    variance = wide[..., :variance_size].pow(2).mean(-1, keepdim=True)
    result = wide * torch.rsqrt(variance + epsilon)
    result = result if weight is None else result.to(weight.dtype) * weight
    return result.to(x.dtype), wide.to(x.dtype)


@define("_C::rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()")
def rms_norm(result: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
    result.copy_(normed(input.float(), weight, epsilon, input.dtype))


@define("_C::fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()")
def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    residual.add_(input)
    input.copy_(normed(residual.float(), weight, epsilon, input.dtype))


# ---- FP8


def codes(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    largest = FP8_MAX[dtype]
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


def token_scale(x: Tensor, dtype: torch.dtype, scale_ub: Tensor | None) -> Tensor:
    amax = x.float().abs().amax(-1, keepdim=True)
    amax = amax if scale_ub is None else torch.minimum(amax, scale_ub)
    return (amax / FP8_MAX[dtype]).clamp(min=1 / (FP8_MAX[dtype] * 512))


def in_groups(x: Tensor, size: int) -> Tensor:
    return x.float().reshape(*x.shape[:-1], x.shape[-1] // size, size)


@define("_C::static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()")
def static_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, group_shape: list[int] | None = None) -> None:
    result.copy_(codes(input, scale, result.dtype))


@define("_C::dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()")
def dynamic_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor) -> None:
    scale.copy_(input.float().abs().max() / FP8_MAX[result.dtype])
    result.copy_(codes(input, scale, result.dtype))


@define("_C::dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()")
def dynamic_per_token_scaled_fp8_quant(result: Tensor, input: Tensor, scale: Tensor, scale_ub: Tensor | None) -> None:
    scale.copy_(token_scale(input, result.dtype, scale_ub))
    result.copy_(codes(input, scale, result.dtype))


@define(
    "_C::per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
    "float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()"
)
def per_token_group_fp8_quant(
    input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float, fp8_min: float, fp8_max: float,
    scale_ue8m0: bool, dummy_is_scale_transposed: bool, dummy_is_tma_aligned: bool,
) -> None:  # fmt: skip
    groups = in_groups(input, group_size)
    scale = groups.abs().amax(-1).clamp(min=eps) / fp8_max
    if scale_ue8m0:
        scale = torch.exp2(torch.ceil(torch.log2(scale.clamp(min=1e-10))))
    output_s.copy_(scale)
    output_q.copy_((groups / scale.unsqueeze(-1)).clamp(fp8_min, fp8_max).reshape(input.shape).to(output_q.dtype))


@define(
    "_C::per_token_group_fp8_quant_packed(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, "
    "float eps, float fp8_min, float fp8_max) -> ()"
)
def per_token_group_fp8_quant_packed(
    input: Tensor, output_q: Tensor, output_s_packed: Tensor, group_size: int, eps: float, fp8_min: float,
    fp8_max: float,
) -> None:  # fmt: skip
    groups = in_groups(input, group_size)
    scale = torch.exp2(torch.ceil(torch.log2((groups.abs().amax(-1).clamp(min=eps) / fp8_max).clamp(min=1e-10))))
    output_q.copy_((groups / scale.unsqueeze(-1)).clamp(fp8_min, fp8_max).reshape(input.shape).to(output_q.dtype))
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    padded = exponents.new_zeros(exponents.shape[0], output_s_packed.shape[1] * 4)
    padded[:, : exponents.shape[1]] = exponents
    output_s_packed.copy_(padded.view(torch.int32))


def group_quantised(x: Tensor, group_size: int, largest: float) -> tuple[Tensor, Tensor]:
    groups = in_groups(x, group_size)
    scale = groups.abs().amax(-1).clamp(min=1e-10) / largest
    quantised = (groups / scale.unsqueeze(-1)).clamp(-largest, largest).reshape(x.shape).to(FP8)
    return quantised, scale


@define("vllm::triton_per_token_group_quant_fp8(Tensor x, SymInt group_size) -> (Tensor, Tensor)")
def triton_per_token_group_quant_fp8(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return group_quantised(x, group_size, FP8_MAX[FP8])


@define("vllm::rocm_aiter_group_fp8_quant(Tensor x, SymInt group_size, bool transpose_scale=False) -> (Tensor, Tensor)")
def rocm_aiter_group_fp8_quant(x: Tensor, group_size: int, transpose_scale: bool = False) -> tuple[Tensor, Tensor]:
    return group_quantised(x, 128, torch.finfo(FP8).max)


@define("vllm::rocm_aiter_per_token_quant(Tensor x, ScalarType quant_dtype, Tensor? scale=None) -> (Tensor, Tensor)")
def rocm_aiter_per_token_quant(
    x: Tensor, quant_dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(quant_dtype).max
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    return (x.float() / scale).clamp(-largest, largest).to(quant_dtype), scale


# ---- norms that quantise


@define("_C::rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon) -> ()")
def rms_norm_static_fp8_quant(result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float) -> None:
    result.copy_(codes(normed(input.float(), weight, epsilon, input.dtype), scale, result.dtype))


@define(
    "_C::fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor! residual, Tensor weight, "
    "Tensor scale, float epsilon) -> ()"
)
def fused_add_rms_norm_static_fp8_quant(
    result: Tensor, input: Tensor, residual: Tensor, weight: Tensor, scale: Tensor, epsilon: float
) -> None:
    residual.add_(input)
    result.copy_(codes(normed(residual.float(), weight, epsilon, input.dtype), scale, result.dtype))


def summed(input: Tensor, residual: Tensor | None) -> Tensor:
    wide = input.float()
    if residual is not None:
        wide = wide + residual.float()
        residual.copy_(wide)
    return wide


@define(
    "_C::rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual) -> ()"
)
def rms_norm_dynamic_per_token_quant(
    result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float, scale_ub: Tensor | None,
    residual: Tensor | None,
) -> None:  # fmt: skip
    norm = normed(summed(input, residual), weight, epsilon, input.dtype)
    scale.copy_(token_scale(norm, result.dtype, scale_ub))
    result.copy_(codes(norm, scale, result.dtype))


@define(
    "_C::rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual, int group_size, bool is_scale_transposed) -> ()"
)
def rms_norm_per_block_quant(
    result: Tensor, input: Tensor, weight: Tensor, scale: Tensor, epsilon: float, scale_ub: Tensor | None,
    residual: Tensor | None, group_size: int, is_scale_transposed: bool,
) -> None:  # fmt: skip
    groups = in_groups(normed(summed(input, residual), weight, epsilon, input.dtype), group_size)
    scales = token_scale(groups, result.dtype, scale_ub)
    scale.copy_(scales.squeeze(-1))
    result.copy_(codes(groups, scales, result.dtype).reshape(input.shape))


# ---- FP4

MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def fp4_quantised(input: Tensor, input_scale: Tensor, swizzled: bool) -> tuple[Tensor, Tensor]:
    tokens, n = input.numel() // input.shape[-1], input.shape[-1]
    blocks = input.float().reshape(tokens, n // 16, 16)
    multiplier = input_scale.reshape(-1, 1)
    scale = (multiplier * blocks.abs().amax(-1) / 6).clamp(max=448).to(torch.float8_e4m3fn)
    factor = torch.where(scale.float() == 0, 0.0, multiplier / scale.float()).unsqueeze(-1)
    scaled = blocks * factor
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for number, midpoint in enumerate(MIDPOINTS):  # a tie goes to the even code
        code += (scaled.abs() > midpoint) if number % 2 == 0 else (scaled.abs() >= midpoint)
    code += torch.signbit(scaled).to(torch.uint8) * 8
    pairs = code.reshape(tokens, n // 2, 2)
    packed = pairs[..., 0] | pairs[..., 1] << 4
    raw = scale.view(torch.uint8)
    if not swizzled:
        return packed, raw
    rows, columns = -(-tokens // 128) * 128, -(-(n // 16) // 4) * 4
    padded = raw.new_zeros(rows, columns)
    padded[:tokens, : n // 16] = raw
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return packed, tiles.reshape(rows, columns).view(torch.int32)


LIBRARIES["_C"].define(
    "scaled_fp4_quant(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout) -> (Tensor, Tensor)"
)
torch.library.impl("_C::scaled_fp4_quant", "CPU", fp4_quantised, lib=LIBRARIES["_C"])


@torch.library.register_fake("_C::scaled_fp4_quant", lib=LIBRARIES["_C"])
def _(input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool) -> tuple[Tensor, Tensor]:
    return fp4_buffers(input, is_sf_swizzled_layout)


@define(
    "_C::scaled_fp4_quant.out(Tensor input, Tensor input_scale, bool is_sf_swizzled_layout, *, Tensor(a!) output, "
    "Tensor(b!) output_scale) -> ()"
)
def scaled_fp4_quant_out(
    input: Tensor, input_scale: Tensor, is_sf_swizzled_layout: bool, *, output: Tensor, output_scale: Tensor
) -> None:
    packed, scale = fp4_quantised(input, input_scale, is_sf_swizzled_layout)
    output.copy_(packed)
    output_scale.copy_(scale)


def fp4_buffers(input: Tensor, swizzled: bool = True) -> tuple[Tensor, Tensor]:
    """What vLLM's ``create_fp4_output_tensors`` gives."""
    tokens, n = input.numel() // input.shape[-1], input.shape[-1]
    packed = input.new_empty((tokens, n // 2), dtype=torch.uint8)
    if not swizzled:
        return packed, input.new_empty((tokens, n // 16), dtype=torch.uint8)
    rows, columns = (tokens + 127) // 128 * 128, (n // 16 + 3) // 4
    return packed, input.new_empty((rows, columns), dtype=torch.int32)


# ---- a user of the norm


@define("vllm::rocm_unquantized_gemm(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
def rocm_unquantized_gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)
