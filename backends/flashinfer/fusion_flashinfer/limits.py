"""Sizes at which each of FlashInfer's two kernel forms is known to be faster, and the most that one launch takes.

Measured by this project on H200s (``benchmarks/README.md``) for sm_90 with 2 and 4 ranks. The others are those that
vLLM ships (``vllm/compilation/passes/fusion/allreduce_rms_fusion.py`` and ``flashinfer_all_reduce.py``, 2026), measured
against vLLM's own unfused path. A table of `fusion-core tune` overrides all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20

MOST = 64 * MIB
"""Bytes of one rank's input in one launch; more takes several. Ranks times bytes stay below 2^30: at more, an index
of FlashInfer's kernels (``clear_offset * comm_size``, int) would overflow."""


@dataclass(frozen=True)
class Limit:
    """Sizes of one rank's input in bytes.

    Attributes:
        one_shot: Up to here every rank reads all of every other rank's input; above, each reduces its share and
            gathers the rest (two-shot).
        most: Above this, the unfused path runs.
    """

    one_shot: int
    most: int


LIMITS: dict[tuple[str, int], Limit] = {
    ("sm_90", 2): Limit(64 * MIB, 64 * MIB),
    ("sm_90", 4): Limit(2 * MIB, 8 * MIB),
    ("sm_90", 8): Limit(MIB // 2, MIB // 2),
    ("sm_100", 2): Limit(32 * MIB, 64 * MIB),
    ("sm_100", 4): Limit(4 * MIB, 32 * MIB),
    ("sm_100", 8): Limit(1 * MIB, 1 * MIB),
    ("sm_103", 2): Limit(32 * MIB, 64 * MIB),
    ("sm_103", 4): Limit(4 * MIB, 64 * MIB),
    ("sm_103", 8): Limit(2 * MIB, 4 * MIB),
}
"""Architecture and number of ranks → limits."""

ONE_SHOT = tuple((arch, ranks, 0, limit.one_shot) for (arch, ranks), limit in LIMITS.items())
"""`KnownFaster.sizes` of the one-shot kernels."""

TWO_SHOT = tuple(
    (arch, ranks, limit.one_shot, limit.most) for (arch, ranks), limit in LIMITS.items() if limit.one_shot < limit.most
)
"""`KnownFaster.sizes` of the two-shot kernels."""
