"""The operators ``torch.ops.fusion_reference.symm_mem_one_shot`` and ``symm_mem_two_shot``: functional, with fakes.

Every choice depends only on facts that are equal on all ranks: shapes, dtypes, arguments, and what the ranks have
agreed on about their buffer. The copy into the buffer removes what may differ, such as the strides of x.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fusion_core.patterns.plain import all_reduce
from fusion_core.workspaces import Call, register_operator
from fusion_reference.buffers import BUFFERS, MEMORY, strategy
from fusion_reference.symm_mem import KERNELS

NAMESPACE = "fusion_reference"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def launch(kernel: str, x: Tensor, group: str, max_tokens: int | None = None) -> Tensor:
    """The sum of every rank's x.

    Args:
        kernel: One of `symm_mem.KERNELS`.
        x: ``[..., n]``, bfloat16 or float32, its bytes a multiple of 16; equal in shape and dtype on all ranks.
        group: The process group's name.
        max_tokens: Rows above which torch's all_reduce runs; None for no bound.

    Returns:
        A contiguous tensor of x's shape and dtype.
    """
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # the kernels run on the current device
        with torch.cuda.device(x.device):
            return launch(kernel, x, group, max_tokens)
    x = x.detach() if x.requires_grad else x  # the buffer must not be part of an autograd graph
    call = Call(all_reduce, strategy(kernel), {"x": x}, group, max_tokens=max_tokens, kernel=kernel)
    too_many = max_tokens is not None and x.numel() > max_tokens * x.shape[-1]
    results = BUFFERS.unfused(call) if too_many or x.nbytes > MEMORY.most else BUFFERS.run(call)
    return results["reduced"]


def _fake(x: Tensor, group: str, max_tokens: int | None = None) -> Tensor:
    return x.new_empty(x.shape)


OPERATORS = {
    kernel: register_operator(
        _LIBRARY, all_reduce, functools.partial(launch, kernel), _fake, name=f"symm_mem_{kernel}",
        options=("int? max_tokens=None",),
    )
    for kernel in KERNELS
}  # fmt: skip
"""Kernel → the overload of its operator."""
