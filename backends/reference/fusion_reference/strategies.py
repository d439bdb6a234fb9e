"""The strategies: every pattern by its definition, and three more ways to do a bare all_reduce."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusion_core import Arch, DType, KnownFaster, MultipleOf, Strategy, WorldSize
from fusion_core.patterns import CORE_PATTERNS
from fusion_reference.buffers import MOST, strategy
from fusion_reference.ops import operator
from fusion_reference.rank_order import DTYPES, all_reduce_in_rank_order
from fusion_reference.requirements import MostBytes, OnlyForItsBits, SymmetricMemory, TorchCollective

PATTERN = "all_reduce"
"""What the three are for: the norm and the quantisation stay in the graph, where Inductor makes one kernel of them."""

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
"""NVIDIA GPUs that add two bfloat16 at once; on older ones the kernels end in an assertion on the GPU."""

AMD_ARCHS = ("gfx942", "gfx950")
"""Those that torch tests its symmetric memory on."""

WORLD_SIZES = {"one_shot": tuple(range(2, 9)), "two_shot": (2, 4, 8)}
"""One-shot takes any number of ranks, but its signals have room for a bounded one; two-shot is compiled for three."""


def strategies() -> Iterator[Strategy]:
    """All of them."""
    for pattern in CORE_PATTERNS:
        yield Strategy(
            pattern=pattern.name,
            name=f"reference.{pattern.name}",
            impl=pattern.function,
            worthwhile=(TorchCollective(),),
        )
    for kernel, sizes in WORLD_SIZES.items():
        yield Strategy(
            pattern=PATTERN,
            name=strategy(kernel),
            impl=operator(kernel),
            requires=(
                SymmetricMemory.here(),
                Arch(*ARCHS, *AMD_ARCHS),
                WorldSize(*sizes),
                DType("x", torch.bfloat16, torch.float32),
                MultipleOf("x", dim=-1, of=8),  # vectors of 16 bytes; the kernels refuse what 4 do not divide
                MostBytes("x", MOST),
            ),
            worthwhile=(KnownFaster("x"),),
            untested="AMD GPUs: none was at hand",
        )
    yield Strategy(
        pattern=PATTERN,
        name="reference.all_reduce_in_rank_order",
        impl=all_reduce_in_rank_order,
        requires=(DType("x", *DTYPES),),
        worthwhile=(OnlyForItsBits(),),
        batch_invariant=True,
    )
