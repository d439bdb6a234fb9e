"""Stands for Acme's kernel library, which would be a compiled extension. Nothing imports it before a kernel runs."""

import torch
from torch import Tensor
from torch.nn import functional


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    residual_out = _all_reduce(x, group) + residual
    wide = functional.rms_norm(residual_out.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    return wide.to(x.dtype), residual_out


def all_reduce_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    residual_out = _all_reduce(x, group) + residual
    return layer_norm(residual_out, weight, eps), residual_out


def layer_norm(hidden: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    wide = functional.layer_norm(hidden.float(), gamma.shape, gamma.float(), None, epsilon)
    return wide.to(hidden.dtype)


def _all_reduce(x: Tensor, group: str) -> Tensor:
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    return torch.ops._c10d_functional.wait_tensor(reduced)
