"""How the operators of aten and prims read: one small rule for each, in terms of products of powers."""

from fusion_core.lift.aten import arithmetic, casts, functions, reductions, views
from fusion_core.lift.rules import Rules

RULES = Rules()
for module in (arithmetic, casts, functions, reductions, views):
    RULES.update(module.RULES)

__all__ = ["RULES"]
