"""Acme's kernels as a backend of fusion_core: only declarations."""

from torch import Tensor, bfloat16, float32, tanh

from fusion_acme import ops
from fusion_core import Contiguous, Dialect, DType, MultipleOf, Pattern, Reading, SameDType, Strategy, hookimpl, pattern
from fusion_core.vocabulary import add, all_reduce, operation

DTYPES = (DType("x", float32, bfloat16), SameDType("x", "residual", "weight"))
REQUIRES = (*DTYPES, MultipleOf("x", dim=-1, of=8), Contiguous("x"), Contiguous("residual"))


@operation(results=("normed",))
def dynamic_tanh(x: Tensor, weight: Tensor, bias: Tensor, alpha: float) -> Tensor:
    return tanh(alpha * x) * weight.to(x.dtype) + bias.to(x.dtype)


@pattern(outputs=("normed", "residual_out"), example=lambda shape, dtype: {"alpha": 0.5})
def all_reduce_add_dynamic_tanh(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, alpha: float, *, group: str):
    residual_out = add(all_reduce(x, group), residual)
    return dynamic_tanh(residual_out, weight, bias, alpha), residual_out


@hookimpl
def fusion_strategies() -> list[Strategy]:
    return [
        Strategy("all_reduce_add_rms_norm", "acme.rms_norm", ops.fused_rms_norm, REQUIRES, outputs=ops.OUTPUTS),
        Strategy("all_reduce_add_dynamic_tanh", "acme.dynamic_tanh", ops.fused_dynamic_tanh, REQUIRES),
    ]


@hookimpl
def fusion_patterns() -> list[Pattern]:
    return [all_reduce_add_dynamic_tanh]


@hookimpl
def fusion_dialects() -> list[Dialect]:
    operands = {"x": "hidden", "weight": "gamma", "bias": "beta", "alpha": "alpha"}
    return [Dialect("acme", {"fusion_acme::dynamic_tanh": Reading("dynamic_tanh", operands, results=("normed",))})]
