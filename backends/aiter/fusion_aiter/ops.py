"""The operators ``torch.ops.fusion_aiter.*``: one for each kernel, functional, with a fake.

Each takes its pattern's tensors and scalars, the group's name, ``max_tokens`` (rows above which it runs unfused; None
for no bound) and ``one_stage`` (see `stages.LATE_GRAPHS`), and returns `Kernel.outputs`. x is ``[..., n]``; see
the patterns for the other shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fusion_aiter.kernels import KERNELS, Form, Kernel, allocate, shaped
from fusion_aiter.launch import launch
from fusion_core.workspaces import register_operator

NAMESPACE = "fusion_aiter"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _fake(kernel: Kernel, x: Tensor, **given: Any) -> Any:
    flat = x.new_empty(x.reshape(-1, x.shape[-1]).shape)  # contiguous, as the real one makes it
    return shaped(kernel, allocate(kernel, flat, Form.of(given)), x.shape[:-1])


_OPERATORS = {
    kernel.name: register_operator(
        _LIBRARY,
        kernel.definition,
        functools.partial(launch, kernel),
        functools.partial(_fake, kernel),
        name=kernel.name,
        scalars=kernel.scalars,
        outputs=kernel.outputs,
        options=("int? max_tokens=None", "bool one_stage=False"),
    )
    for kernel in KERNELS
}


def operator(kernel: Kernel) -> Any:
    """The overload of a kernel's operator."""
    return _OPERATORS[kernel.name]
