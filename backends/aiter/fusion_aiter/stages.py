"""Which of a kernel's forms AITER runs: one stage, two stages, or none that is correct.

In one stage every rank reads all of every other rank's input; in two each reduces its share and gathers the rest.
Source: the dispatchers in AITER's ``csrc/include/custom_all_reduce.cuh`` at v0.1.20.post1, which check less than their
kernels need.
"""

from __future__ import annotations

from fusion_aiter.kernels import PACK, Kernel

KIB = 1 << 10

MOST = 64 << 20
"""Bytes of one rank's input above which AITER's own callers use RCCL (``AITER_CUSTOM_AR_MAX_SIZE``), and vLLM too."""

MOST_SHARED = 512 * KIB
"""Bytes of input up to which the two-stage MXFP4 kernel reduces in shared memory; there is none for more."""

MOST_PACKS = 1024
"""Most packs of a row, one per thread of a block, in one stage and in kernels that write FP8 or MXFP4."""

PLAIN_PACKS = (64, 2048)
"""Least and most packs of a row in the two-stage kernel without a quantisation."""

WARP = 32
"""Packs per warp in the two-stage FP8 kernels. They count warps by integer division, and leave a last partial warp out
of the sum of squares."""

LATE_GRAPHS = ("gfx942",)
"""Architectures on which the one-stage kernels can be silently wrong in a CUDA graph's first replay (aiter#4888,
vLLM#52150). They run there only if the user asks: a choice by whether a capture runs could differ between ranks."""

ONE_STAGE_BELOW = {2: MOST + 1, 4: 256 * KIB, 8: 128 * KIB}
"""Number of ranks → bytes of one rank's input below which one stage is faster, by vLLM's rule for these kernels; with
two ranks both forms send the same bytes."""


def one_stage_runs(hidden: int, itemsize: int) -> bool:
    """Whether a row fits the one-stage kernels.

    Args:
        hidden: Elements of a row.
        itemsize: Bytes of an element.
    """
    return hidden * itemsize % PACK == 0 and 1 <= hidden * itemsize // PACK <= MOST_PACKS


def two_stages_run(kernel: Kernel, hidden: int, itemsize: int, world_size: int) -> bool:
    """Whether a row fits the two-stage kernels."""
    if hidden * itemsize % PACK:
        return False
    packs = hidden * itemsize // PACK
    if packs == 0 or packs % world_size:  # each rank reduces the same number of packs, and a remainder stays unwritten
        return False
    if not kernel.quantization:
        return PLAIN_PACKS[0] <= packs <= PLAIN_PACKS[1]
    if packs > MOST_PACKS:
        return False
    return packs % WARP == 0 if kernel.quantization != "mxfp4" or kernel.norm_out else True


def stages_that_run(
    kernel: Kernel, hidden: int, itemsize: int, world_size: int, arch: str, *, one_stage: bool
) -> tuple[bool, bool]:
    """Whether one stage, and whether two, may be used for such rows.

    Args:
        kernel: The kernel.
        hidden: Elements of a row.
        itemsize: Bytes of an element.
        world_size: Number of ranks.
        arch: The GPU's architecture.
        one_stage: Whether the user asked for one stage where `LATE_GRAPHS` would forbid it.
    """
    allowed = one_stage or arch not in LATE_GRAPHS
    return allowed and one_stage_runs(hidden, itemsize), two_stages_run(kernel, hidden, itemsize, world_size)


def stage_at(
    kernel: Kernel, tokens: int, hidden: int, itemsize: int, world_size: int, arch: str, *, one_stage: bool
) -> bool | None:
    """Whether to run a call in one stage; None if neither form takes it.

    It depends only on facts that are equal on all ranks: the arguments of `stages_that_run` and the number of tokens.
    """
    size = tokens * hidden * itemsize
    if size > MOST:
        return None
    if not kernel.norms:
        return False  # AITER's bare all_reduce chooses by itself
    one, two = stages_that_run(kernel, hidden, itemsize, world_size, arch, one_stage=one_stage)
    if kernel.quantization == "mxfp4" and size > MOST_SHARED:
        two = False
    if one and (not two or size < ONE_STAGE_BELOW.get(world_size, 0)):
        return True
    return False if two else None
