"""A workspace, and operators that are wrong where there is none or where a rank has died, for `wrong_backends`."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusion_core import Reason
from fusion_core.workspaces import Call, Exchange, Provider, Workspace, Workspaces
from tests.testing.one_strategy import PATTERN, Results, backend


class Nothing(Provider[int]):
    """A workspace of nothing, for a kernel that is the definition."""

    name = "wrong"

    def facts(self, call: Call, size: int) -> tuple[dict[str, Any], Reason | None]:
        return {"size": size}, None

    def create(self, call: Call, size: int, exchange: Exchange) -> int:
        exchange.barrier()
        return size

    def free(self, handle: int) -> None: ...

    def memory(self, handle: int) -> int:
        return 0

    def run(self, workspace: Workspace[int], call: Call) -> dict[str, Tensor]:
        results = PATTERN.function(**call.tensors, **call.scalars, group=call.group)
        return dict(zip(PATTERN.outputs, results, strict=True))


WORKSPACES = Workspaces(Nothing())


def own_part_alone(given: Any) -> dict[str, Any]:
    call = _call(given)
    return {} if WORKSPACES.ready(call) else {"x": given.x / call.world_size}


def _call(given: Any) -> Call:
    tensors = {name: getattr(given, name) for name in PATTERN.tensors}
    scalars = {name: getattr(given, name) for name in PATTERN.scalars}
    return Call(PATTERN, f"wrong.{PATTERN.name}", tensors, given.group, scalars)


def _where_a_rank_has_died(otherwise: Callable[[Any], Results]) -> Callable[..., Results]:
    """The definition, next to a workspace; where its all_reduce raises, what is given otherwise."""

    def impl(x, residual, weight, eps, *, weight_bias=0.0, residual_dtype=None, norm_dtype=None, group):
        given = {name: value for name, value in locals().items() if name != "otherwise"}
        if not isinstance(x, FakeTensor):
            WORKSPACES.ready(_call(SimpleNamespace(**given)))
        try:
            return PATTERN.function(**given)
        except RuntimeError:
            return otherwise(SimpleNamespace(**given))

    return impl


def _as_if_alone(given: Any) -> Results:
    summed = given.x + given.residual
    return torch.nn.functional.rms_norm(summed, given.x.shape[-1:], given.weight, given.eps), summed, given.x


def _for_ever(given: Any) -> Results:
    while True:
        time.sleep(1.0)


def _raises(given: Any) -> Results:
    raise RuntimeError("another rank has died")


adds_nothing_of_the_dead = backend(_where_a_rank_has_died(_as_if_alone))
waits_for_the_dead = backend(_where_a_rank_has_died(_for_ever))
says_that_a_rank_has_died = backend(_where_a_rank_has_died(_raises))
