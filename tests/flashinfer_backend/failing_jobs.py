"""What the workers of `test_workspaces` run where something fails: on one rank, in a kernel, between ranks."""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from fusion_core.agree.agreement import Agreement
from fusion_core.fallback import fallen_back
from fusion_core.workspaces import Call
from fusion_flashinfer.kernels import Kernel
from fusion_flashinfer.workspaces import WORKSPACES
from tests.flashinfer_backend import stand_in
from tests.flashinfer_backend.forms import variants
from tests.flashinfer_backend.jobs import TIMES, calls_of, fresh
from tests.flashinfer_backend.one_call import BY_NAME, run


def call_of(kernel: Kernel, x: torch.Tensor, scalars: Any = MappingProxyType({})) -> Call:
    """A call of a kernel in the default group, as far as it decides on the workspace."""
    form, strategy = kernel.forms[True, False, False], kernel.strategies[False, False, False]
    return Call(kernel.definition, strategy, {"x": x}, dist.group.WORLD.group_name, scalars, kernel=form)


def a_part_that_is_wrong() -> tuple[list[tuple[int, bool]], float, dict[str, str]]:
    """Ten rows in parts of four, the last of which runs by a kernel that is wrong here: what ran, the distance."""
    fresh(4 * 256 * 2)
    stand_in.wrong.add((0, True))
    run("all_reduce", 10, two_shot=True)
    stand_in.calls.clear()
    distance = run("all_reduce", 10, two_shot=True)
    return [(call.tokens, call.one_shot) for call in stand_in.calls], distance, fell_back()


def fell_back() -> dict[str, str]:
    """Every strategy that runs unfused in the default group, and why."""
    reasons = {each.name: fallen_back(each.name, dist.group.WORLD.group_name) for each in variants()}
    return {name: "; ".join(map(str, said)) for name, said in reasons.items() if said}


def one_rank_fails(rank: int, **where: Any) -> tuple[float, dict[str, str], str, int]:
    """A workspace that comes up on all ranks but one: the result, the reasons, the status, what is left allocated."""
    fresh()
    stand_in.fails_to_create.add(rank)
    distance = run("all_reduce_add_rms_norm", **where)
    stand_in.fails_to_create.clear()
    again = run("all_reduce_add_rms_norm", 7, **where)
    (status,) = WORKSPACES.status()
    assert not stand_in.calls, "remembered: nobody tries again"
    return max(distance, again), fell_back(), status.state, len(stand_in.alive)


def one_rank_fails_and_is_slow_to_say_so(rank: int) -> tuple[float, dict[str, str], str, int]:
    """The same where the others come to the vote before the rank that failed."""
    abandon = Agreement.abandon

    def slowly(self: Agreement, reason: Any) -> None:
        abandon(self, reason)
        time.sleep(0.3 * (self.rank == rank))

    Agreement.abandon = slowly
    try:
        return one_rank_fails(rank)
    finally:
        Agreement.abandon = abandon


def growth_fails(rank: int) -> tuple[list[bool], str]:
    """Whether calls are fused: small, too large for what one rank has memory for, small again; and the status."""
    fresh()
    found = []
    for tokens in (4, 5000, 5001, 6):  # the last in a form of its own
        if tokens == 5000:
            stand_in.fails_to_create.add(rank)
        run("all_reduce_add_rms_norm", tokens, 512)
        stand_in.calls.clear()
        assert run("all_reduce_add_rms_norm", tokens, 512) <= 1
        found.append(bool(stand_in.calls))
    (status,) = WORKSPACES.status()
    assert len(stand_in.alive) == 1
    return found, status.state


def with_multicast() -> str:
    """FlashInfer's workspace under confidential computing."""
    fresh()
    stand_in.multicast = True
    assert run("all_reduce") <= 1
    (status,) = WORKSPACES.status()
    return status.state


def multicast_uninvited() -> str:
    """A workspace that uses multicast although it should not."""
    fresh()
    stand_in.multicast = True
    stand_in.library.confidential_computing = lambda: False
    try:
        assert run("all_reduce") <= 1
        (status,) = WORKSPACES.status()
        return status.state
    finally:
        stand_in.library.confidential_computing = lambda: stand_in.multicast


def wrong_form(code: int, name: str, one_shot: bool) -> tuple[list[bool], dict[str, str]]:
    """A kernel that is wrong in one of its forms: whether one-shot and two-shot calls are fused, and what is said."""
    fresh()
    stand_in.wrong.add((code, one_shot))
    return [bool(calls_of(name, 6, two_shot=two_shot)) for two_shot in (False, True)], fell_back()


def wrong_kernel(code: int, name: str) -> tuple[float, str, float]:
    """A kernel that is wrong on this machine: the result, the reason, and another kernel's result."""
    fresh()
    stand_in.wrong.add(code)
    distance = run(name)
    (status,) = WORKSPACES.status()
    stand_in.calls.clear()
    other = run("all_reduce")
    assert [call.pattern for call in stand_in.calls][-1:] == [0]
    return distance, status.state, other


def disagreeing() -> str:
    """Ranks whose first calls are of different sizes: the real kernels would hang."""
    fresh()
    TIMES.arrival = TIMES.step = 30.0
    kernel, x = BY_NAME["all_reduce"], torch.ones(4 + (1 << 13) * dist.get_rank(), 256)
    assert WORKSPACES.ready(call_of(kernel, x)) is None
    (status,) = WORKSPACES.status()
    return status.state


def late(rank: int) -> str:
    """One rank that never comes to its first call."""
    fresh()
    TIMES.arrival = TIMES.step = 3.0
    dist.barrier()  # so that the time limit counts from one moment
    kernel, x = BY_NAME["all_reduce"], torch.ones(4, 256)
    if dist.get_rank() == rank:
        dist.barrier()  # until the others have given up
        return "late"
    try:
        assert WORKSPACES.ready(call_of(kernel, x)) is None
        (status,) = WORKSPACES.status()
        return status.state
    finally:
        dist.barrier()


def fp4_check(scale_layout: str) -> list[str]:
    """The self-check of an FP4 kernel."""
    fresh()
    kernel, x = BY_NAME["all_reduce_add_rms_norm_nvfp4"], torch.ones(4, 256, dtype=torch.bfloat16)
    scalars = {"eps": 1e-5, "weight_bias": 0.0, "scale_layout": scale_layout}
    assert WORKSPACES.ready(call_of(kernel, x, scalars)) is None
    return [*fell_back().values()]
