"""The library's own patterns: ``all_reduce [+ residual] → {LayerNorm, RMSNorm [→ FP8, FP4]}``, and of split vectors."""

from fusion_core.patterns import fp4, fp8, layer_norm, plain, sharded
from fusion_core.patterns.definition import Pattern

CORE_PATTERNS: tuple[Pattern, ...] = tuple(
    value
    for module in (plain, layer_norm, fp8, fp4, sharded)
    for value in vars(module).values()
    if isinstance(value, Pattern)
)
"""Every pattern of the library."""

__all__ = ["CORE_PATTERNS"]
