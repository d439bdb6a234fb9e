"""Rules that read the operators of aten and prims as products of powers, one small rule for each."""

from fusion_core.lift.aten import arithmetic, casts, functions, reductions, views
from fusion_core.lift.rules import Rules

RULES = Rules()
for module in (arithmetic, casts, functions, reductions, views):
    RULES.update(module.RULES)

__all__ = ["RULES"]
