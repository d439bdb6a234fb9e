"""Sizes at which AITER's kernels are known to be faster.

This project has not measured them. vLLM and SGLang use them on these GPUs by default up to 64 MiB of input
(``vllm/compilation/passes/fusion/allreduce_rms_fusion.py``, 2026); AITER's pull request 1290 measured 14 to 30 % on
MI300X (16 x 2048: 17 to 11.9 us, 256 x 8192: 57.9 to 43.3 us).
"""

from __future__ import annotations

from fusion_aiter.stages import MOST

SIZES = tuple((arch, ranks, 0, MOST) for arch in ("gfx942", "gfx950") for ranks in (2, 4, 8))
"""`KnownFaster.sizes`."""
