"""How far apart two results of one call are, whatever they are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05}
_LARGEST_LIMIT = 0.1
"""Of bfloat16, and of what is narrower: rounding in another order moves logits of a few layers by 0.02 to 0.03."""


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def kept(value: Any) -> list[torch.Tensor]:
    """Copies of the floating-point tensors in a result: a CUDA graph writes its next results over the old ones.

    Of a tensor that is split over ranks, this rank's share.
    """
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors(value))
    return [tensor.detach().clone() for tensor in local if tensor.is_floating_point()]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float | None:
    """The largest difference over the largest magnitude of ``one``, of the tensor where that is largest.

    None where there is nothing to compare. Infinite where shapes differ, where one alone is not finite somewhere, and
    where a tensor is finite nowhere.
    """
    if len(one) != len(other):
        return math.inf
    return max(map(_distance, one, other), default=None)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return math.inf
    if not one.numel():
        return 0.0
    one, other = (each.double() if each.dtype == torch.float64 else each.float() for each in (one, other))
    finite = one.isfinite()
    same = bool((finite == other.isfinite()).all())
    # masks hold infinities: those are to be the same ones
    if not same or not finite.any() or not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return math.inf
    one, other = one[finite], other[finite]
    apart, largest = float((one - other).abs().max()), float(one.abs().max())
    return (apart / largest if largest else math.inf) if apart else 0.0


def limit(dtypes: Iterable[torch.dtype]) -> float:
    """The largest `difference` that rounding explains, by the narrowest floating-point dtype that takes part."""
    return max((_LIMITS.get(dtype, _LARGEST_LIMIT) for dtype in dtypes if dtype.is_floating_point), default=0.1)
