"""Acme's kernels as a backend of fusion_core: only declarations."""

from torch import Tensor, bfloat16, float32, nn

from fusion_acme import ops
from fusion_core import Contiguous, Dialect, DType, MultipleOf, Pattern, Reading, SameDType, Strategy, hookimpl, pattern
from fusion_core.vocabulary import add, all_reduce, operation

DTYPES = (DType("x", float32, bfloat16), SameDType("x", "residual", "weight"))
REQUIRES = (*DTYPES, MultipleOf("x", dim=-1, of=8), Contiguous("x"), Contiguous("residual"))


@operation(results=("normed",))
def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nn.functional.layer_norm(x, weight.shape, eps=eps) * weight.to(x.dtype)


@pattern(outputs=("normed", "residual_out"))
def all_reduce_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, group: str):
    residual_out = add(all_reduce(x, group), residual)
    return layer_norm(residual_out, weight, eps), residual_out


@hookimpl
def fusion_strategies() -> list[Strategy]:
    return [
        Strategy("all_reduce_add_rms_norm", "acme.rms_norm", ops.fused_rms_norm, REQUIRES, outputs=ops.OUTPUTS),
        Strategy("all_reduce_add_layer_norm", "acme.layer_norm", ops.fused_layer_norm, REQUIRES),
    ]


@hookimpl
def fusion_patterns() -> list[Pattern]:
    return [all_reduce_add_layer_norm]


@hookimpl
def fusion_dialects() -> list[Dialect]:
    reading = Reading("layer_norm", {"x": "hidden", "weight": "gamma", "eps": "epsilon"}, results=("normed",))
    return [Dialect("acme", {"fusion_acme::layer_norm": reading})]
