"""The difference between two results of one call, in any nesting of containers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from fusion_core._torch.tensors import tree_leaves

_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05}
_LARGEST_LIMIT = 0.1
"""For bfloat16 and narrower dtypes: rounding in another order moves the logits of a few layers by 0.02 to 0.03."""


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested containers, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def kept(value: Any) -> list[torch.Tensor]:
    """Copies of the floating-point tensors in a result, which a CUDA graph's next replay overwrites.

    For a tensor that is sharded over ranks, this rank's shard.
    """
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors(value))
    return [tensor.detach().clone() for tensor in local if tensor.is_floating_point()]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float | None:
    """The largest difference over the largest magnitude of ``one``: computed per tensor, the largest is returned.

    None if there are no tensors to compare. Infinite if shapes differ, if an element is finite in only one of them, or
    if a tensor has no finite element.
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
    # masks contain infinities, which must be the same in both
    if not same or not finite.any() or not torch.equal(one[~finite].nan_to_num(), other[~finite].nan_to_num()):
        return math.inf
    one, other = one[finite], other[finite]
    apart, largest = float((one - other).abs().max()), float(one.abs().max())
    return (apart / largest if largest else math.inf) if apart else 0.0


def limit(dtypes: Iterable[torch.dtype]) -> float:
    """The largest `difference` that rounding explains, given by the narrowest floating-point dtype involved."""
    return max((_LIMITS.get(dtype, _LARGEST_LIMIT) for dtype in dtypes if dtype.is_floating_point), default=0.1)
