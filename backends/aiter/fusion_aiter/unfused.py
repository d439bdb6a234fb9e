"""The path for what the fused kernel does not take at run time: torch's all_reduce, then the norm and quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_aiter.kernels import Form, Kernel
from fusion_core.vocabulary import quantize_group_fp8, quantize_mxfp4, quantize_token_fp8


def unfused(
    kernel: Kernel,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: Form,
    group: str,
) -> dict[str, Tensor]:
    """What ``kernel`` computes, by other kernels; the arguments of `launch` with x as ``[tokens, n]``."""
    total = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    total = torch.ops._c10d_functional.wait_tensor(total)
    if residual is not None:
        total = total + residual
    found = {kernel.outputs[-1]: total}
    if weight is None:
        return found
    wide = weight.float() + weight_bias if weight_bias else weight.float()
    normed = torch.nn.functional.rms_norm(total.float(), total.shape[-1:], wide, eps).to(total.dtype)
    found["normed"] = normed
    if kernel.quantization == "token_fp8":
        found["quantized"], found["scale"] = quantize_token_fp8(normed, dtype=form.fp8_dtype, min_scale=0.0)
    elif kernel.quantization == "group_fp8":
        layout = "column_major" if form.transposed else "row_major"
        found["quantized"], found["scale"] = quantize_group_fp8(
            normed, group_size=form.group_size, dtype=form.fp8_dtype, min_scale=0.0, scale_layout=layout
        )
    elif kernel.quantization == "mxfp4":
        found["quantized"], found["scale"] = quantize_mxfp4(normed, ties="away")
    return found
