"""The operators ``torch.ops.fusion_reference.symm_mem_one_shot`` and ``symm_mem_two_shot``: functional, with fakes.

Every choice is made of facts that are equal on all ranks: shapes, dtypes, arguments, and what the ranks have agreed on
about their buffer. What may differ between ranks, such as the strides of x, is evened out by the copy into the buffer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fusion_reference.buffers import BUFFERS
from fusion_reference.symm_mem import KERNELS

NAMESPACE = "fusion_reference"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def launch(kernel: str, x: Tensor, group: str, max_tokens: int | None = None) -> Tensor:
    """The sum of every rank's x.

    Args:
        kernel: One of `symm_mem.KERNELS`.
        x: ``[..., n]``, bfloat16 or float32, its bytes a multiple of 16; equal in shape and dtype on all ranks.
        group: The process group's name.
        max_tokens: Rows above which torch's all_reduce runs; None for no such bound.

    Returns:
        A contiguous tensor of x's shape and dtype.
    """
    if x.numel() == 0:  # no rank has anything to send
        return x.new_empty(x.shape)
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # the kernels run on the current device
        with torch.cuda.device(x.device):
            return launch(kernel, x, group, max_tokens)
    x = x.detach() if x.requires_grad else x  # the buffer must not take part in anybody's graph of gradients
    ready = BUFFERS.ready(kernel, x, group, max_tokens)
    if ready is None:
        total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group)
        reduced: Tensor = torch.ops._c10d_functional.wait_tensor(total)
        return reduced
    return ready.run(kernel, x)


def _fake(x: Tensor, group: str, max_tokens: int | None = None) -> Tensor:
    return x.new_empty(x.shape)


for _kernel in KERNELS:
    _LIBRARY.define(f"symm_mem_{_kernel}(Tensor x, str group, int? max_tokens=None) -> Tensor")
    _LIBRARY.impl(f"symm_mem_{_kernel}", functools.partial(launch, _kernel), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::symm_mem_{_kernel}", _fake, lib=_LIBRARY)


def operator(kernel: str) -> Any:
    """The overload of a kernel's operator."""
    return getattr(getattr(torch.ops, NAMESPACE), f"symm_mem_{kernel}").default
