"""The strategy with variants that docs/writing_a_backend.md shows."""

from typing import Any

from torch import Tensor, bfloat16

from fusion_core import DType, SameDType, Strategy, Tokens, Variant, hookimpl
from fusion_core.patterns.plain import all_reduce_add_rms_norm


def fused_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    group: str,
    two_shot: bool = False,
    overlap: bool = False,
) -> Any:
    return all_reduce_add_rms_norm.function(x, residual, weight, eps, group=group)[:2]


@hookimpl
def fusion_strategies() -> list[Strategy]:
    return [
        Strategy(
            "all_reduce_add_rms_norm",
            "acme.rms_norm",
            fused_rms_norm,
            requires=(DType("x", bfloat16), SameDType("x", "residual", "weight")),
            outputs=("normed", "residual_out"),
            variants=(
                Variant(""),
                Variant("two_shot", {"two_shot": True}, (Tokens(least=9),), rank=-1),
                Variant("overlap", {"overlap": True}, option="overlap", rank=1),
            ),
        )
    ]
