"""An all_reduce whose bits depend only on a row's own values: an all_gather, then a sum in the order of the ranks.

NCCL's own sum of a row also depends on the row's place in the buffer and on the algorithm that the buffer's size
selects. This one costs memory for all ranks' parts, world size times x, and their transfer over the links.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_core import ConfigError, process_group
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
    try:
        ranks = process_group(group).size()
    except ConfigError:
        # torch raises its own error; fake tensors, which need no group, get a result of the right form
        unknown: Tensor = all_reduce.function(x.contiguous(), group=group)
        return unknown
    ops = torch.ops._c10d_functional
    parts = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous().unsqueeze(0), ranks, group))
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    total: Tensor = parts[0].to(wide)
    for rank in range(1, ranks):
        total = total + parts[rank].to(wide)
    return total.to(x.dtype)
