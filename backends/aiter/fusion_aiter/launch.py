"""One call of a kernel: its operands, the choice between fused and unfused, AITER's call.

Every choice is made of facts that are equal on all ranks: shapes, dtypes, arguments, the architecture, and what the
ranks have agreed on about their communicator. What may differ between ranks, such as the alignment of a tensor, is
mended by a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_aiter.calls import call
from fusion_aiter.communicators import COMMUNICATORS
from fusion_aiter.kernels import PACK, Form, Kernel, allocate, shaped
from fusion_aiter.unfused import unfused


def launch(
    kernel: Kernel,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: Form,
    group: str,
    max_tokens: int | None = None,
    one_stage: bool = False,
) -> Any:
    """Run a kernel, fused where its communicator takes it.

    Args:
        kernel: The kernel.
        x: ``[..., n]``, this rank's part of the sum.
        residual: Of x's shape, or None.
        weight: ``[n]``; None for the bare all_reduce.
        eps: Added to the mean of squares.
        weight_bias: Added to the weight.
        form: Of the quantisation.
        group: The process group's name.
        max_tokens: Rows above which to run unfused; None for no such bound.
        one_stage: Whether the user asked for kernels of one stage.

    Returns:
        `Kernel.outputs`, with x's leading dimensions.
    """
    hidden = x.shape[-1]
    # two dimensions: AITER takes the first size of x for the number of rows of transposed scales, and writes past them
    flat = _rows(x, hidden)
    if x.numel() == 0:  # no rank has anything to send
        return shaped(kernel, allocate(kernel, flat, form), x.shape[:-1])
    residual = None if residual is None else _rows(residual, hidden)
    weight = None if weight is None else _aligned(weight)
    ready = COMMUNICATORS.ready(kernel, flat, group, max_tokens, one_stage)
    found = None
    if ready is not None:
        held = ready.held
        if kernel.norms and residual is None:
            residual = held.zeros_like(flat, max(1 << 20, 1 << (flat.numel() - 1).bit_length()))[0]
        found = call(
            kernel, held.communicator, flat, residual, weight, eps, weight_bias, form, one_stage=ready.one_stage
        )
    if found is None:
        residual = residual if kernel.adds else None
        found = unfused(kernel, flat, residual, weight, eps, weight_bias, form, group)
    return shaped(kernel, found, x.shape[:-1])


def _rows(tensor: Tensor, hidden: int) -> Tensor:
    return _aligned(tensor if tensor.dim() == 2 else tensor.reshape(-1, hidden))


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and not tensor.data_ptr() % PACK:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
