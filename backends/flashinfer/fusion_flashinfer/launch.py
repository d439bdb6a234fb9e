"""One call of a kernel: its memory, the choice between fused and unfused, FlashInfer's call.

Every choice is made of facts that are equal on all ranks: shapes, dtypes, arguments, and what the ranks have agreed on
about their workspace. What may differ between ranks, such as the alignment of a tensor, is mended by a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_flashinfer.fused import fused
from fusion_flashinfer.kernels import Kernel, allocate
from fusion_flashinfer.limits import MOST
from fusion_flashinfer.unfused import unfused
from fusion_flashinfer.workspaces import WORKSPACES

ALIGNMENT = 16
"""Bytes: the kernels load vectors of 16 and fault on other addresses."""


def launch(
    kernel: Kernel,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    eps: float,
    weight_bias: float,
    option: Any,
    group: str,
    max_tokens: int | None = None,
    pdl: bool = False,
    mnnvl: bool = False,
    two_shot: bool = False,
    always: bool = False,
) -> Any:
    """Run a kernel, fused where the workspace takes it.

    More rows than one launch takes go in several, where the results can be written in parts.

    Args:
        kernel: The kernel.
        x: ``[..., n]``, this rank's part of the sum.
        residual: Of x's shape, or None.
        weight: ``[n]``; None for the bare all_reduce.
        scale: One float32: the scale of a static quantisation or the multiplier of NVFP4.
        eps: Added to the mean of squares.
        weight_bias: Added to the weight.
        option: ``group_size`` or ``scale_layout``.
        group: The process group's name.
        max_tokens: Rows above which to run unfused; None for no such bound.
        pdl: Launch with programmatic dependent launch.
        mnnvl: Use FlashInfer's multicast kernels.
        two_shot: Reduce in two steps; up to as many rows as ranks it is one all the same, since FlashInfer's two-shot
            kernel asserts more (``trtllm_ar.py``).
        always: Never unfused for the number of rows: ``max_tokens`` is the most of one launch.

    Returns:
        `Kernel.outputs`, with x's leading dimensions.
    """
    hidden = x.shape[-1]
    flat = _rows(x, hidden)
    options: dict[str, Any] = {}
    if option is not None:
        options = {"group_size" if kernel.quantization == "group_fp8" else "scale_layout": option}
    if x.numel() == 0:  # a grid of no blocks is an error of CUDA; no rank has anything to send
        return allocate(kernel, flat, **options).shaped(kernel, x.shape[:-1])
    residual = None if residual is None else _rows(residual, hidden)
    weight = None if weight is None else _aligned(weight)
    most = MOST // (hidden * x.dtype.itemsize)
    if always and max_tokens is not None:
        most = min(most, max_tokens)
    parts = -(-flat.shape[0] // most)
    too_many = not always and max_tokens is not None and flat.shape[0] > max_tokens
    ready = None
    if not too_many and (parts == 1 or kernel.in_parts):
        # parts of one size, so that no small one is left over
        rows = -(-flat.shape[0] // parts)
        ready = WORKSPACES.ready(kernel, flat[:rows], group, max_tokens, pdl, mnnvl, two_shot)
    if ready is None:
        buffers = unfused(kernel, flat, residual, weight, scale, eps, weight_bias, group, options)
        return buffers.shaped(kernel, x.shape[:-1])
    buffers = allocate(kernel, flat, **options)
    if parts == 1:
        fused(kernel, ready, buffers, flat, residual, weight, scale, eps, weight_bias, option, pdl)
        return buffers.shaped(kernel, x.shape[:-1])
    for start in range(0, flat.shape[0], rows):
        part = slice(start, start + rows)
        given, added = flat[part], None if residual is None else residual[part]
        # the last part may be of so few rows that another kernel runs it, which may have failed its self-check
        ready = WORKSPACES.ready(kernel, given, group, max_tokens, pdl, mnnvl, two_shot)
        if ready is None:
            buffers = unfused(kernel, flat, residual, weight, scale, eps, weight_bias, group, options)
            return buffers.shaped(kernel, x.shape[:-1])
        fused(kernel, ready, buffers.part(part), given, added, weight, scale, eps, weight_bias, option, pdl)
    return buffers.shaped(kernel, x.shape[:-1])


def _rows(tensor: Tensor, hidden: int) -> Tensor:
    return _aligned(tensor if tensor.dim() == 2 else tensor.reshape(-1, hidden))


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and not tensor.data_ptr() % ALIGNMENT:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
