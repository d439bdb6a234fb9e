"""An all_reduce whose bits hang on nothing but a row's own numbers: gathered, then added in the order of the ranks.

NCCL's own sum of a row depends on where in the buffer the row lies and on which algorithm the buffer's size selects;
this one does not. It costs the other ranks' parts in memory, world size times x, and their way over the links.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_core.groups import world_size
from fusion_core.patterns.plain import all_reduce

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def all_reduce_in_rank_order(x: Tensor, *, group: str) -> Tensor:
    """``((x_0 + x_1) + x_2) + ...``, accumulated in float32 (float64 for float64) and rounded once.

    Plain torch operators, which Inductor fuses with each other and with what follows.

    Args:
        x: Any shape, one of `DTYPES`.
        group: The process group's name.

    Returns:
        A tensor of x's shape and dtype, contiguous.
    """
    ranks = world_size(group)
    if ranks is None:
        # for torch to refuse in its own words; fake tensors, which need no group, get the form of the result
        unknown: Tensor = all_reduce.function(x.contiguous(), group=group)
        return unknown
    ops = torch.ops._c10d_functional
    parts = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous().unsqueeze(0), ranks, group))
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    total: Tensor = parts[0].to(wide)
    for rank in range(1, ranks):
        total = total + parts[rank].to(wide)
    return total.to(x.dtype)
