"""Collectives of the neutral vocabulary."""

from __future__ import annotations

import torch

from fusion_core.vocabulary.operation import operation


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@operation(results=("reduced",), alone=_copy)
def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of every rank's ``x``: ``reduced = x_0 + x_1 + ... + x_{N-1}``, the same on every rank.

    Args:
        x: Any shape and any floating dtype, both equal on all ranks.
        group: The process group's name in `torch.distributed` (``ProcessGroup.group_name``).

    Returns:
        A tensor of ``x``'s shape and dtype. The process group determines the order and precision of the sum.
    """
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    result: torch.Tensor = torch.ops._c10d_functional.wait_tensor(reduced)
    return result
