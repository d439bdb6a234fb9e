"""The strategies: every pattern by its definition, and two more for the bare all_reduce."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusion_core import Arch, DType, KnownFaster, MultipleOf, Strategy, Variant, WorldSize
from fusion_core.patterns import CORE_PATTERNS
from fusion_reference.buffers import MEMORY
from fusion_reference.ops import OPERATORS
from fusion_reference.rank_order import DTYPES, all_reduce_in_rank_order
from fusion_reference.requirements import MostBytes, OnlyForItsBits, SymmetricMemory, TorchCollective
from fusion_reference.sharded import SHARDED, all_reduce_means

PATTERN = "all_reduce"
"""The pattern of those two: norm and quantisation stay in the graph, where Inductor makes one kernel of them."""

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
"""NVIDIA GPUs that add two bfloat16 at once; on older ones the kernels fail an assertion on the GPU."""

AMD_ARCHS = ("gfx942", "gfx950")
"""AMD GPUs on which torch tests its symmetric memory."""

WORLD_SIZES = {"one_shot": tuple(range(2, 9)), "two_shot": (2, 4, 8)}
"""One-shot takes any number of ranks that its signals have room for; two-shot is compiled for these three."""


def strategies() -> Iterator[Strategy]:
    """All strategies of this backend."""
    for name, impl in SHARDED.items():
        yield Strategy(pattern=name, name=f"reference.{name}", impl=impl, reduces_means=impl is all_reduce_means)
    for pattern in CORE_PATTERNS:
        if pattern.name in SHARDED:  # the definition sends whole vectors
            continue
        yield Strategy(
            pattern=pattern.name,
            name=f"reference.{pattern.name}",
            impl=pattern.function,
            worthwhile=(TorchCollective(),),
        )
    yield Strategy(
        pattern=PATTERN,
        name="reference.symm_mem",
        impl=OPERATORS["one_shot"],
        requires=(
            SymmetricMemory.here(),
            Arch(*ARCHS, *AMD_ARCHS),
            DType("x", torch.bfloat16, torch.float32),
            MultipleOf("x", dim=-1, of=8),  # vectors of 16 bytes; the kernels refuse sizes that 4 bytes do not divide
            MostBytes("x", MEMORY.most),
        ),
        worthwhile=(KnownFaster("x"),),
        untested="AMD GPUs: none was at hand",
        variants=tuple(
            Variant(kernel, requires=(WorldSize(*sizes),), impl=OPERATORS[kernel])
            for kernel, sizes in WORLD_SIZES.items()
        ),
    )
    yield Strategy(
        pattern=PATTERN,
        name="reference.all_reduce_in_rank_order",
        impl=all_reduce_in_rank_order,
        requires=(DType("x", *DTYPES),),
        worthwhile=(OnlyForItsBits(),),
        batch_invariant=True,
    )
