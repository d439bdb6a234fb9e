"""One call of a kernel: its memory, the choice between fused and unfused, FlashInfer's call.

Every choice depends only on facts that are equal on all ranks: shapes, dtypes, arguments, and what the ranks have
agreed on about their workspace. A copy removes what may differ, such as the alignment of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core import process_group
from fusion_core.workspaces import Call
from fusion_flashinfer.fused import fused
from fusion_flashinfer.kernels import Kernel, allocate, shaped
from fusion_flashinfer.limits import MOST
from fusion_flashinfer.workspaces import WORKSPACES

ALIGNMENT = 16
"""Bytes: the kernels load vectors of 16 and fault on other addresses."""


def launch(
    kernel: Kernel,
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    group: str = "",
    max_tokens: int | None = None,
    pdl: bool = False,
    mnnvl: bool = False,
    two_shot: bool = False,
    always: bool = False,
    **given: Any,
) -> Any:
    """Run a kernel, fused if the workspace takes the call.

    More rows than one launch takes are split into several launches if the results can be written in parts.

    Args:
        kernel: The kernel.
        x: ``[..., n]``, this rank's part of the sum.
        residual: A tensor of x's shape, or None.
        weight: ``[n]``; None for the bare all_reduce.
        group: The process group's name.
        max_tokens: Rows above which to run unfused; None for no bound.
        pdl: Launch with programmatic dependent launch.
        mnnvl: Use FlashInfer's multicast kernels.
        two_shot: Reduce in two steps. At most as many rows as ranks still take one, since FlashInfer's two-shot kernel
            asserts more (``trtllm_ar.py``).
        always: Never run unfused because of the number of rows: ``max_tokens`` then bounds one launch.
        **given: The pattern's scalars, and its ``scale`` or ``global_scale``: one float32, the scale of a static
            quantisation or the multiplier of NVFP4.

    Returns:
        `Kernel.outputs`, with x's leading dimensions.
    """
    hidden = x.shape[-1]
    tensors = {"x": _rows(x, hidden)}
    if residual is not None:
        tensors["residual"] = _rows(residual, hidden)
    if weight is not None:
        tensors["weight"] = _aligned(weight)
    for name in ("scale", "global_scale"):
        if name in given:
            tensors[name] = given.pop(name)
    scalars = {**given, "scale_format": "ue8m0_packed"} if kernel.quantization == "group_fp8" else given

    def call_of(tensors: Mapping[str, Tensor]) -> Call:
        one_shot: bool | None = not two_shot or tensors["x"].shape[0] <= process_group(group).size()
        if mnnvl:
            one_shot = None  # mnnvl has its own kernels, and its own rule
        strategy, form = kernel.strategies[two_shot, pdl, mnnvl], kernel.forms[one_shot, pdl, mnnvl]
        return Call(kernel.definition, strategy, tensors, group, scalars, kernel.outputs, max_tokens, form)

    rows, most = tensors["x"].shape[0], MOST // (hidden * x.dtype.itemsize)
    if always and max_tokens is not None:
        most = min(most, max_tokens)
    parts, too_many = -(-rows // most), not always and max_tokens is not None and rows > max_tokens
    results: Mapping[str, Tensor] | None = None
    if parts > 1 and kernel.in_parts and not too_many:
        results = _in_parts(kernel, tensors, -(-rows // parts), call_of)
    elif parts <= 1 and not too_many:
        results = WORKSPACES.run(call_of(tensors))
    if results is None:
        results = WORKSPACES.unfused(call_of(tensors))
    return shaped(kernel, results, x.shape[:-1], given.get("scale_layout", "linear"))


def _in_parts(kernel: Kernel, tensors: Mapping[str, Tensor], rows: int, call_of: Any) -> dict[str, Tensor] | None:
    """The results of launches of this many rows each: parts of nearly one size, so that no small one is left over.

    None if one of them cannot be fused. The last part may have so few rows that another kernel runs it, which may have
    failed its self-check.
    """
    x = tensors["x"]
    results = allocate(kernel, x)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        cut = {name: each[part] if name in ("x", "residual") else each for name, each in tensors.items()}
        call = call_of(cut)
        workspace = WORKSPACES.ready(call)
        if workspace is None:
            return None
        fused(workspace, call, {name: each[part] for name, each in results.items()})
    return results


def _rows(tensor: Tensor, hidden: int) -> Tensor:
    return _aligned(tensor if tensor.dim() == 2 else tensor.reshape(-1, hidden))


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and not tensor.data_ptr() % ALIGNMENT:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
