"""The operators ``torch.ops.fusion_aiter.*``: one for each kernel, functional, with a fake.

Registered with `torch.library.Library` and not with `torch.library.custom_op`, whose wrapper costs some 30 us a call.
Each takes its pattern's tensors and scalars, the form of its quantisation, the group's name, ``max_tokens`` (rows above
which it runs unfused; None for no such bound) and ``one_stage`` (see `stages.LATE_GRAPHS`), and returns
`Kernel.outputs`. x is ``[..., n]``; see the patterns for the other shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_aiter.kernels import KERNELS, Form, Kernel, allocate, shaped
from fusion_aiter.launch import launch

NAMESPACE = "fusion_aiter"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_FORMS = {
    "token_fp8": ("ScalarType fp8_dtype",),
    "group_fp8": ("ScalarType fp8_dtype", "int group_size", "bool transposed"),
}
_WHERE = ("str group", "int? max_tokens=None", "bool one_stage=False")


def schema(kernel: Kernel) -> str:
    """The operator's schema."""
    parameters = ["Tensor x"]
    if kernel.norms:
        parameters += ["Tensor residual"] if kernel.adds else []
        parameters += ["Tensor weight", "float eps"]
        parameters += ["float weight_bias"] if kernel.gemma else []
        parameters += _FORMS.get(kernel.quantization, ())
    results = ", ".join(f"Tensor {name}" for name in kernel.outputs)
    return f"{kernel.name}({', '.join((*parameters, *_WHERE))}) -> ({results})"


def _given(kernel: Kernel, given: tuple[Any, ...]) -> tuple[list[Any], float, Form, tuple[Any, ...]]:
    """What follows x in the schema: the residual, the weight and eps; the weight's bias; the form; where to run."""
    if not kernel.norms:
        return [None, None, 0.0], 0.0, Form(), given
    place = kernel.adds + 2
    values = list(given[:place]) if kernel.adds else [None, *given[:place]]
    bias = given[place] if kernel.gemma else 0.0
    place += kernel.gemma
    wide = len(_FORMS.get(kernel.quantization, ()))
    return values, bias, Form(*given[place : place + wide]), given[place + wide :]


def runner(kernel: Kernel) -> Callable[..., Any]:
    """The operator on a GPU: its arguments in the schema's order, those at their default left out."""

    def run(x: Tensor, *given: Any) -> Any:
        (residual, weight, eps), bias, form, where = _given(kernel, given)
        return launch(kernel, x, residual, weight, eps, bias, form, *where)

    return run


def _fake(kernel: Kernel) -> Callable[..., Any]:
    def fake(x: Tensor, *given: Any) -> Any:
        flat = x.new_empty(x.reshape(-1, x.shape[-1]).shape)  # contiguous, as the real one makes it
        return shaped(kernel, allocate(kernel, flat, _given(kernel, given)[2]), x.shape[:-1])

    return fake


for _kernel in KERNELS:
    _LIBRARY.define(schema(_kernel))
    _LIBRARY.impl(_kernel.name, runner(_kernel), "CUDA")  # torch's name for ROCm too
    torch.library.register_fake(f"{NAMESPACE}::{_kernel.name}", _fake(_kernel), lib=_LIBRARY)


def operator(kernel: Kernel) -> Any:
    """The overload of a kernel's operator."""
    return getattr(getattr(torch.ops, NAMESPACE), kernel.name).default
