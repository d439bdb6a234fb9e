"""One call of a kernel: its operands, the choice between fused and unfused, AITER's call.

Every choice depends only on facts that are equal on all ranks: shapes, dtypes, arguments, the architecture, and what
the ranks have agreed on about their communicator. A copy removes what may differ, such as the alignment of a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusion_aiter.communicators import COMMUNICATORS
from fusion_aiter.kernels import PACK, Kernel, shaped
from fusion_aiter.stages import MOST_SHARED, stage_at
from fusion_core import Device, process_group
from fusion_core.workspaces import Call


def launch(
    kernel: Kernel,
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    group: str = "",
    max_tokens: int | None = None,
    one_stage: bool = False,
    **scalars: Any,
) -> Any:
    """Run a kernel, fused if its communicator takes the call.

    Args:
        kernel: The kernel.
        x: ``[..., n]``, this rank's part of the sum.
        residual: A tensor of x's shape, or None.
        weight: ``[n]``; None for the bare all_reduce.
        group: The process group's name.
        max_tokens: Rows above which to run unfused; None for no bound.
        one_stage: Whether the user asked for one-stage kernels.
        **scalars: The pattern's scalars.

    Returns:
        `Kernel.outputs`, with x's leading dimensions.
    """
    hidden = x.shape[-1]
    # two dimensions: AITER takes x's first size as the rows of transposed scales, and would write past their end
    tensors = {"x": _rows(x, hidden)}
    if residual is not None:
        tensors["residual"] = _rows(residual, hidden)
    if weight is not None:
        tensors["weight"] = _aligned(weight)
    tokens, ranks, arch = tensors["x"].shape[0], process_group(group).size(), Device.of(x.device).arch
    stage = stage_at(kernel, tokens, hidden, x.dtype.itemsize, ranks, arch, one_stage=one_stage)
    # above that size AITER runs other kernels, which are checked separately
    form = None if stage is None else kernel.staged[stage, x.nbytes > MOST_SHARED]
    strategy = f"aiter.{kernel.name}{'_one_stage' if one_stage else ''}"
    scalars |= kernel.fixed
    call = Call(kernel.definition, strategy, tensors, group, scalars, kernel.outputs, max_tokens, form)
    fits = form is not None and (max_tokens is None or tokens <= max_tokens)
    return shaped(kernel, COMMUNICATORS.run(call) if fits else COMMUNICATORS.unfused(call), x.shape[:-1])


def _rows(tensor: Tensor, hidden: int) -> Tensor:
    return _aligned(tensor if tensor.dim() == 2 else tensor.reshape(-1, hidden))


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and not tensor.data_ptr() % PACK:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
