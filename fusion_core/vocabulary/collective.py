"""Collectives of the neutral vocabulary."""

from __future__ import annotations

import torch

from fusion_core.vocabulary.operation import operation


@operation(results=("reduced",))
def all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of every rank's ``x``: ``reduced = x_0 + x_1 + ... + x_{N-1}``, the same on every rank.

    Args:
        x: Any shape and any floating dtype, both equal on all ranks.
        group: The process group's name, as `torch.distributed` gives it (``ProcessGroup.group_name``).

    Returns:
        A tensor of ``x``'s shape and dtype. Order and precision of the sum are the process group's own.
    """
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group)
    result: torch.Tensor = torch.ops._c10d_functional.wait_tensor(reduced)
    return result
