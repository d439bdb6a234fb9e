"""Acme's operators: a schema and a fake for each. The kernel library is imported when one first runs."""

import torch
from torch import Tensor

from fusion_core import process_group

OUTPUTS = ("normed", "residual_out")


@torch.library.custom_op("fusion_acme::all_reduce_add_rms_norm", mutates_args=())
def fused_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    from fusion_acme import kernels

    return kernels.all_reduce_add_rms_norm(x, residual, weight, eps, process_group(group))


@torch.library.custom_op("fusion_acme::all_reduce_add_layer_norm", mutates_args=())
def fused_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    from fusion_acme import kernels

    return kernels.all_reduce_add_layer_norm(x, residual, weight, eps, process_group(group))


@fused_rms_norm.register_fake
@fused_layer_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("fusion_acme::layer_norm", mutates_args=())
def layer_norm(hidden: Tensor, gamma: Tensor, epsilon: float = 1e-5) -> Tensor:
    """The operator that a model written for Acme calls."""
    from fusion_acme import kernels

    return kernels.layer_norm(hidden, gamma, epsilon)


@layer_norm.register_fake
def _(hidden: Tensor, gamma: Tensor, epsilon: float = 1e-5) -> Tensor:
    return torch.empty_like(hidden)
