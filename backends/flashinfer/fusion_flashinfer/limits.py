"""Up to which input size FlashInfer's kernels are known to be faster, and which of the two to take.

Measured by this project on H200s (``benchmarks/README.md``) for sm_90 with 2 and 4 ranks. The others are what vLLM
ships (``vllm/compilation/passes/fusion/allreduce_rms_fusion.py`` and ``flashinfer_all_reduce.py``, 2026), which
measured them against its own unfused path. What nobody has measured is not in the table, and is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limit:
    """Sizes of one rank's input in bytes.

    Attributes:
        one_shot: Up to here every rank reads all of every other rank's input; above, each reduces its share and
            gathers the rest (two-shot).
        most: Above this, the unfused path.
    """

    one_shot: int
    most: int

    def one_shot_at(self, size: int, tokens: int, world_size: int) -> bool | None:
        """Whether to run the one-shot kernel at this size; None for neither.

        The two-shot kernel asserts more tokens than ranks (``trtllm_ar.py``).
        """
        if size <= self.one_shot:
            return True
        return False if size <= self.most and tokens > world_size else None


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
"""Architecture and number of ranks → limits. The largest product of ranks and bytes stays below 2^30: at more, an
index of FlashInfer's kernels (``clear_offset * comm_size``, int) would overflow."""

UNMEASURED = Limit(MIB // 2, MIB // 2)
"""Where the table has no entry and a strategy runs all the same, as in the conformance kit."""


def limit(arch: str, world_size: int) -> Limit:
    """The limits of an architecture and a number of ranks."""
    return LIMITS.get((arch, world_size), UNMEASURED)
