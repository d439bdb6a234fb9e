"""A backend of one strategy, from a function or from a change of the definition. Workers import it: no test library."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusion_core import (
    Strategy,
    hookimpl,
)
from fusion_core.patterns import CORE_PATTERNS

PATTERN = next(each for each in CORE_PATTERNS if each.name == "all_reduce_add_rms_norm")
Results = tuple[Tensor, ...]


def backend(impl: Callable[..., Any], pattern=PATTERN, **declared: Any) -> SimpleNamespace:
    """A plugin with one strategy."""

    def fusion_strategies() -> list[Strategy]:
        return [Strategy(pattern=pattern.name, name=f"wrong.{pattern.name}", impl=impl, **declared)]

    own = [] if pattern in CORE_PATTERNS else [pattern]
    return SimpleNamespace(fusion_strategies=hookimpl(fusion_strategies), fusion_patterns=hookimpl(lambda: own))


def behind(change: Callable[..., Any]) -> Callable[..., Any]:
    """The definition, with a change of what it gives for real tensors. The change takes the arguments and results."""

    def impl(x, residual, weight, eps, *, weight_bias=0.0, residual_dtype=None, norm_dtype=None, group):
        given = {name: value for name, value in locals().items() if name != "change"}
        results = PATTERN.function(**given)
        return results if isinstance(x, FakeTensor) else change(SimpleNamespace(**given), *results)

    return impl


def before(change: Callable[..., Any]) -> Callable[..., Any]:
    """The definition of other arguments than it was given."""

    def impl(x, residual, weight, eps, *, weight_bias=0.0, residual_dtype=None, norm_dtype=None, group):
        given = {name: value for name, value in locals().items() if name != "change"}
        return PATTERN.function(**{**given, **({} if isinstance(x, FakeTensor) else change(SimpleNamespace(**given)))})

    return impl


def operator(name: str, real: Callable[..., Results], fake: Callable[..., Results]) -> Any:
    def run(
        x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return real(x, residual, weight, eps, group)

    def run_fake(x, residual, weight, eps, group):
        plain = x.new_empty(x.shape)
        summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
        return fake(summed, summed.clone(), plain)

    operator = torch.library.custom_op(f"fusion_wrong::{name}", run, mutates_args=())
    operator.register_fake(run_fake)
    return operator


def definition(x, residual, weight, eps, group) -> Results:
    # an operator's results may not be each other, nor its inputs; and are dense here, as the fake says
    results = PATTERN.function(x, residual, weight, eps, group=group)
    return tuple(torch.empty(each.shape, dtype=each.dtype).copy_(each) for each in results)
