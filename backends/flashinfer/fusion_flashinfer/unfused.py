"""The path for what the fused kernel cannot take at run time: torch's all_reduce, then the norm in one kernel.

The norm is taken of the rounded sum, as in the pattern and in the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_core.vocabulary import quantize_group_fp8, quantize_nvfp4, quantize_static_fp8, quantize_token_fp8
from fusion_flashinfer.kernels import Buffers, Kernel
from fusion_flashinfer.library import norms

HALVES = (torch.bfloat16, torch.float16)


def unfused(
    kernel: Kernel,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    weight_bias: float,
    group: str,
    options: dict[str, Any],
) -> Buffers:
    """What ``kernel`` computes, by other kernels; the arguments of `launch` with x as ``[tokens, n]``."""
    total = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    total = torch.ops._c10d_functional.wait_tensor(total)
    if residual is not None:
        total = total + residual
    if weight is None:
        return Buffers(total)
    if kernel.quantization == "static_fp8" and not kernel.norm_out and weight_bias == 0.0 and _served(total):
        quantized = torch.empty_like(total, dtype=torch.float8_e4m3fn)
        norms().rmsnorm_quant(quantized, total, weight, scale, eps, enable_pdl=False)
        return Buffers(total, quantized=quantized)
    normed = _norm(total, weight, eps, weight_bias)
    found = Buffers(total, normed)
    if kernel.quantization == "static_fp8":
        assert scale is not None
        found.quantized = quantize_static_fp8(normed, scale)
    elif kernel.quantization == "token_fp8":
        found.quantized, found.scale = quantize_token_fp8(normed)
    elif kernel.quantization == "group_fp8":
        found.scale_has_own_rows = True
        found.quantized, found.scale = quantize_group_fp8(normed, scale_format="ue8m0_packed", **options)
    elif kernel.quantization == "nvfp4":
        assert scale is not None
        found.scale_has_own_rows = options["scale_layout"] != "linear"
        found.quantized, found.scale = quantize_nvfp4(normed, scale, **options)
    return found


def _served(x: Tensor) -> bool:
    """Whether `flashinfer.norm` has a kernel for it."""
    return x.is_cuda and x.dtype in HALVES and norms() is not None


def _norm(x: Tensor, weight: Tensor, eps: float, weight_bias: float) -> Tensor:
    if weight_bias in (0.0, 1.0) and _served(x):
        norm = norms().gemma_rmsnorm if weight_bias else norms().rmsnorm
        result: Tensor = norm(x, weight, eps, enable_pdl=False)
        return result
    wide = weight.float() + weight_bias if weight_bias else weight.float()
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], wide, eps).to(x.dtype)
