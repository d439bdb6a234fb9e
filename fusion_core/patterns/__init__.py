"""The library's own patterns: ``all_reduce [+ residual] → rms_norm → {nothing, FP8, FP4}``; norms of split vectors."""

from fusion_core.patterns import fp4, fp8, plain, sharded
from fusion_core.patterns.definition import Pattern

CORE_PATTERNS: tuple[Pattern, ...] = tuple(
    value for module in (plain, fp8, fp4, sharded) for value in vars(module).values() if isinstance(value, Pattern)
)
"""Every pattern of the library."""

__all__ = ["CORE_PATTERNS"]
