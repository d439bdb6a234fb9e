"""Acme's operators: a schema and a fake for each. The kernel library is imported when one first runs."""

import torch
from torch import Tensor

from fusion_core import process_group

OUTPUTS = ("normed", "residual_out")


@torch.library.custom_op("fusion_acme::all_reduce_add_rms_norm", mutates_args=())
def fused_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
    from fusion_acme import kernels

    return kernels.all_reduce_add_rms_norm(x, residual, weight, eps, process_group(group))


@torch.library.custom_op("fusion_acme::all_reduce_add_dynamic_tanh", mutates_args=())
def fused_dynamic_tanh(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, alpha: float, group: str
) -> tuple[Tensor, Tensor]:
    from fusion_acme import kernels

    return kernels.all_reduce_add_dynamic_tanh(x, residual, weight, bias, alpha, process_group(group))


@fused_rms_norm.register_fake
@fused_dynamic_tanh.register_fake
def _(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("fusion_acme::dynamic_tanh", mutates_args=())
def dynamic_tanh(hidden: Tensor, gamma: Tensor, beta: Tensor, alpha: float = 0.5) -> Tensor:
    """Dynamic Tanh, which replaces a norm (Zhu et al. 2025): the operator that a model written for Acme calls."""
    from fusion_acme import kernels

    return kernels.dynamic_tanh(hidden, gamma, beta, alpha)


@dynamic_tanh.register_fake
def _(hidden: Tensor, gamma: Tensor, beta: Tensor, alpha: float = 0.5) -> Tensor:
    return torch.empty_like(hidden)
