"""The operators ``torch.ops.fusion_flashinfer.*``: one for each kernel, functional, with a fake.

Each takes its pattern's tensors, its scalars, the group's name, ``max_tokens`` (rows above which it runs unfused;
None for no bound), ``pdl`` (programmatic dependent launch), ``mnnvl`` (FlashInfer's multicast kernels), ``two_shot``
and ``always`` (see `launch`), and returns `Kernel.outputs`. x is ``[..., n]``; see the patterns for the other shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fusion_core.workspaces import register_operator
from fusion_flashinfer.kernels import KERNELS, Kernel, allocate, shaped
from fusion_flashinfer.launch import launch

NAMESPACE = "fusion_flashinfer"
OPTIONS = (
    "int? max_tokens=None",
    "bool pdl=False",
    "bool mnnvl=False",
    "bool two_shot=False",
    "bool always=False",
)
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _fake(kernel: Kernel, x: Tensor, **given: Any) -> Any:
    flat = x.new_empty(x.reshape(-1, x.shape[-1]).shape)  # contiguous, as the real one makes it
    found = allocate(kernel, flat, **{name: given[name] for name in kernel.option})
    return shaped(kernel, found, x.shape[:-1], given.get("scale_layout", "linear"))


_OPERATORS = {
    kernel.name: register_operator(
        _LIBRARY,
        kernel.definition,
        functools.partial(launch, kernel),
        functools.partial(_fake, kernel),
        name=kernel.name,
        scalars=("eps", "weight_bias", *kernel.option) if kernel.norms else (),
        outputs=kernel.outputs,
        options=OPTIONS,
    )
    for kernel in KERNELS
}


def operator(kernel: Kernel) -> Any:
    """The overload of a kernel's operator."""
    return _OPERATORS[kernel.name]
