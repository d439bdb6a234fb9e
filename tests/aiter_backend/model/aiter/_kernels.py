"""What the kernels compute from every rank's input: pure functions of matrices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aiter._dispatch import Launch
from aiter._memory import uninitialised
from aiter._norms import counted, residual_sum, residual_sum_mxfp4, rms_norm, total
from aiter._quantise import group_fp8, mxfp4, token_fp8
from aiter._rounding import TRUNCATES, cast


@dataclass(frozen=True)
class Results:
    """Matrices that a kernel stores; None stands for what it leaves as it was.

    Attributes:
        out: The norm, or its codes.
        residual: The new residual.
        scale: Of the codes, one row per token.
        mirror: The norm in the input's dtype, before quantisation.
    """

    out: Tensor | None = None
    residual: Tensor | None = None
    scale: Tensor | None = None
    mirror: Tensor | None = None


def fused(
    launch: Launch,
    kernel: str,
    inputs: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    gemma: bool = False,
    group_size: int = 0,
) -> Results:
    """One of the fused operators, on the kernel that `Launch.kernel` chose.

    Args:
        launch: The call.
        kernel: Its kernel.
        inputs: One matrix ``[m, input_n]`` per rank.
        residual: ``[m, n]`` in the input's dtype.
        weight: ``[n]`` in the input's dtype.
        eps: As given.
        gemma: Whether the weight gets 1 added.
        group_size: Of FP8 with groups.
    """
    if kernel == "nothing":
        return Results()
    n, plain = launch.n, launch.kind == "plain"
    a = total([each[:, :n] for each in inputs], launch.dtype)
    if lost := launch.lost_packs(kernel) * launch.pack:
        a = torch.cat([a.flatten()[:-lost], uninitialised(lost, dtype=launch.dtype)]).view_as(a)
    if launch.kind == "mxfp4":
        x, new_residual = residual_sum_mxfp4(a, residual, kernel=kernel)
    else:
        x, new_residual = residual_sum(a, residual, kernel=kernel, plain=plain)
    padded = plain or launch.kind == "mxfp4" or kernel == "1-stage"
    seen = counted(n, launch.dtype.itemsize, whole=padded)
    weight_first = plain and kernel == "2-stage"
    normed = rms_norm(x, weight, eps, gemma=gemma, seen=seen, weight_first=weight_first)
    mirror = cast(normed, launch.dtype)
    if plain:
        return Results(torch.nn.functional.pad(mirror, (0, launch.out_n - n)), new_residual)
    if launch.kind == "token_fp8":
        codes, scale = token_fp8(normed, seen)
    elif launch.kind == "group_fp8":
        codes, scale = group_fp8(normed, group_size)
    else:
        codes, scale = mxfp4(normed)
    return Results(codes, new_residual, scale, mirror)


def all_reduce(inputs: Sequence[Tensor], *, use_new: bool) -> Tensor:
    """The sum of flat tensors, one per rank.

    With one stage, and where a rank writes its share to all (gfx942, 8 ranks), it runs over ranks 0, 1, ...; with two
    stages each rank's share begins with that rank. Every rank gets the same bits all the same.
    """
    x, world_size = inputs[0], len(inputs)
    pack, size = 16 // x.itemsize, x.numel() * x.itemsize
    most = (160 if world_size <= 4 else 80) if use_new else (512 if world_size <= 4 else 256)
    writes = use_new and world_size == 8 and TRUNCATES and size > 4 << 20 and size % (16 * world_size) == 0
    if world_size == 2 or size < most << 10 or writes:
        return total(inputs, x.dtype)
    share = x.numel() // pack // world_size * pack
    ends = [share * rank for rank in range(world_size)] + [x.numel()]
    shares = [
        total([inputs[(rank + step) % world_size][ends[rank] : ends[rank + 1]] for step in range(world_size)], x.dtype)
        for rank in range(world_size)
    ]
    return torch.cat(shares)
