"""FlashInfer's call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusion_flashinfer.held import Ready
from fusion_flashinfer.kernels import Kernel

LAYOUTS = {"swizzled_128x4": 0, "linear": 2}
"""``QuantizationSFLayout``. Its 8x4 layout is not here: the kernels of ``trtllm`` write nothing there."""


def fused(
    kernel: Kernel,
    ready: Ready,
    buffers: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    weight_bias: float,
    option: Any,
    pdl: bool,
) -> None:
    """FlashInfer's call, into ``buffers``."""
    if kernel.norms and residual is None:
        residual = ready.zeros(x)
    if scale is not None and scale.dim() != 1:
        scale = scale.reshape(1)
    layout = group_size = None
    if option is not None:
        layout, group_size = (LAYOUTS[option], None) if kernel.quantization == "nvfp4" else (None, option)
    ready.call(
        kernel.code, ready.one_shot, pdl, x, buffers.total, residual, buffers.normed, buffers.quantized, buffers.scale,
        weight, eps, weight_bias, scale, layout, group_size,
    )  # fmt: skip
