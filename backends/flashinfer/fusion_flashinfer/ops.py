"""The operators ``torch.ops.fusion_flashinfer.*``: one for each kernel, functional, with a fake.

Registered with `torch.library.Library` and not with `torch.library.custom_op`, whose wrapper costs some 30 us a call.
Each takes its pattern's tensors, its scalars, the group's name, ``max_tokens`` (the workspace's capacity; None for as
much as pays), ``pdl`` (programmatic dependent launch), ``mnnvl`` (FlashInfer's multicast kernels), ``two_shot`` and
``always`` (see `launch`), and returns `Kernel.outputs`. x is ``[..., n]``; see the patterns for the other shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusion_flashinfer.kernels import KERNELS, Kernel, allocate
from fusion_flashinfer.launch import launch

NAMESPACE = "fusion_flashinfer"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_SCALARS = {"group_fp8": ("int group_size",), "nvfp4": ("str scale_layout",)}
_SCALES = {"static_fp8": ("Tensor scale",), "nvfp4": ("Tensor global_scale",)}
_WHERE = (
    "str group",
    "int? max_tokens=None",
    "bool pdl=False",
    "bool mnnvl=False",
    "bool two_shot=False",
    "bool always=False",
)


def schema(kernel: Kernel) -> str:
    """The operator's schema."""
    parameters = ["Tensor x"]
    if kernel.norms:
        parameters += ["Tensor residual"] if kernel.adds else []
        parameters += ["Tensor weight", *_SCALES.get(kernel.quantization, ())]
        parameters += ["float eps", "float weight_bias", *_SCALARS.get(kernel.quantization, ())]
    results = ", ".join(f"Tensor {name}" for name in kernel.outputs)
    return f"{kernel.name}({', '.join((*parameters, *_WHERE))}) -> ({results})"


def _runner(kernel: Kernel) -> Callable[..., Any]:
    """The operator on a GPU: its arguments in the schema's order, those at their default left out.

    Spelt out and not taken from a list by place: this runs at every site of every step of an eager model. ``w`` is what
    `_WHERE` names.
    """
    k = kernel
    if not k.norms:
        return lambda x, *w: launch(k, x, None, None, None, 0.0, 0.0, None, *w)
    scale, scalar = k.quantization in _SCALES, k.quantization in _SCALARS
    run: dict[tuple[bool, bool], Callable[..., Any]]
    if k.adds:
        run = {
            (False, False): lambda x, r, g, eps, bias, *w: launch(k, x, r, g, None, eps, bias, None, *w),
            (True, False): lambda x, r, g, s, eps, bias, *w: launch(k, x, r, g, s, eps, bias, None, *w),
            (False, True): lambda x, r, g, eps, bias, o, *w: launch(k, x, r, g, None, eps, bias, o, *w),
            (True, True): lambda x, r, g, s, eps, bias, o, *w: launch(k, x, r, g, s, eps, bias, o, *w),
        }
        return run[scale, scalar]
    run = {
        (False, False): lambda x, g, eps, bias, *w: launch(k, x, None, g, None, eps, bias, None, *w),
        (True, False): lambda x, g, s, eps, bias, *w: launch(k, x, None, g, s, eps, bias, None, *w),
        (False, True): lambda x, g, eps, bias, o, *w: launch(k, x, None, g, None, eps, bias, o, *w),
        (True, True): lambda x, g, s, eps, bias, o, *w: launch(k, x, None, g, s, eps, bias, o, *w),
    }
    return run[scale, scalar]


def _fake(kernel: Kernel) -> Callable[..., Any]:
    place = kernel.adds + 1 + (kernel.quantization in _SCALES) + 2  # of the quantisation's own scalar, behind x

    def fake(x: Tensor, *given: Any) -> Any:
        options: dict[str, Any] = {}
        if kernel.quantization == "group_fp8":
            options = {"group_size": given[place]}
        elif kernel.quantization == "nvfp4":
            options = {"scale_layout": given[place]}
        flat = x.new_empty(x.reshape(-1, x.shape[-1]).shape)  # contiguous, as the real one makes it
        return allocate(kernel, flat, **options).shaped(kernel, x.shape[:-1])

    return fake


for _kernel in KERNELS:
    _LIBRARY.define(schema(_kernel))
    _LIBRARY.impl(_kernel.name, _runner(_kernel), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_kernel.name}", _fake(_kernel), lib=_LIBRARY)


def operator(kernel: Kernel) -> Any:
    """The overload of a kernel's operator."""
    return getattr(getattr(torch.ops, NAMESPACE), kernel.name).default
