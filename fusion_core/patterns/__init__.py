"""The library's own patterns: ``all_reduce [+ residual] → rms_norm → {nothing, FP8, FP4}``."""

from fusion_core.patterns.definition import Pattern
from fusion_core.patterns import plain

CORE_PATTERNS: tuple[Pattern, ...] = tuple(value for module in (plain,) for value in vars(module).values() if isinstance(value, Pattern))
"""Every pattern of the library, shortest definitions first."""

__all__ = ["CORE_PATTERNS"]
