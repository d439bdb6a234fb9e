"""What the workers of these tests run, over the stand-in."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
import torch.distributed as dist

from fusion_core import FusionConfig, run_time
from fusion_core.agree.agreement import Agreement
from fusion_core.patterns.plain import all_reduce
from fusion_core.run_time import fallen_back
from fusion_core.workspaces import per_group
from fusion_flashinfer import creation, launch
from fusion_flashinfer.kernels import KERNELS
from fusion_flashinfer.limits import MOST
from fusion_flashinfer.self_check import self_check
from fusion_flashinfer.strategies import STRATEGIES
from fusion_flashinfer.workspaces import WORKSPACES
from tests.flashinfer_backend import stand_in
from tests.flashinfer_backend.one_call import BY_NAME, inputs, run

stand_in.install()


def fresh(most: int = MOST) -> None:
    """Forget what an earlier test left; take so many bytes in one launch."""
    WORKSPACES.groups.release()
    run_time._fallen_back.clear()
    for names in (stand_in.fails_to_create, stand_in.wrong, stand_in.calls, stand_in.past, stand_in.alive):
        names.clear()
    stand_in.multicast = stand_in.moved = False
    launch.MOST = most


def all_kernels(
    rows: list[tuple[int, int]], dtypes: list[torch.dtype], two_shot: bool, moved: bool = False
) -> list[str]:
    """Every kernel that this machine could have, at these sizes: what is off."""
    fresh()
    stand_in.moved = moved
    off = []
    for kernel in KERNELS:
        if kernel.quantization == "nvfp4":
            continue
        for dtype in dtypes:
            for tokens, hidden in rows:
                for bias in (0.0, 1.0):
                    if kernel.quantization and (dtype == torch.float32 or hidden % 128):
                        continue
                    if (distance := run(kernel.name, tokens, hidden, dtype, bias=bias, two_shot=two_shot)) > 1:
                        off.append(f"{kernel.name} {tokens}x{hidden} {dtype} bias {bias}: {distance}")
    assert len(stand_in.past) == (0 if moved else len(stand_in.calls))
    assert {call.pattern for call in stand_in.calls} == {0, 1, 2, 4, 8, 9, 10, 11}, state()
    assert {call.one_shot for call in stand_in.calls} == ({True, False} if two_shot else {True})
    return off


def calls_of(name: str, tokens: int, **where: Any) -> list[Any]:
    """The calls of FlashInfer of one call of an operator, which is right, when all has been made and checked."""
    assert run(name, tokens, **where) <= 1
    stand_in.calls.clear()
    assert run(name, tokens, **where) <= 1
    return list(stand_in.calls)


def shots(sizes: list[int], two_shot: bool) -> list[Any]:
    """For each number of tokens: whether the kernel ran one-shot or two-shot (False)."""
    fresh()
    return [[call.one_shot for call in calls_of("all_reduce", tokens, two_shot=two_shot)] for tokens in sizes]


def parts(most: int, sizes: list[int], **where: Any) -> dict[str, list[list[int]]]:
    """For each kernel, and each number of tokens, how many of them each launch took."""
    fresh(most * 256 * 2)
    names = [kernel.name for kernel in KERNELS if kernel.quantization != "nvfp4"]
    return {name: [[call.tokens for call in calls_of(name, size, **where)] for size in sizes] for name in names}


def parts_with_leading_dimensions(name: str) -> tuple[float, list[tuple[int, bool]]]:
    """An input of three dimensions in parts, the last of which two-shot does not take: the distance; what ran."""
    fresh(4 * 256 * 2)
    run(name, 9, lead=(3, 3), two_shot=True)
    stand_in.calls.clear()
    return run(name, 9, lead=(3, 3), two_shot=True), [(call.tokens, call.one_shot) for call in stand_in.calls]


def a_part_that_is_wrong() -> tuple[list[tuple[int, bool]], float, dict[str, str]]:
    """Ten rows in parts of four, the last of which runs by a kernel that is wrong here: what ran, the distance."""
    fresh(4 * 256 * 2)
    stand_in.wrong.add((0, True))
    run("all_reduce", 10, two_shot=True)
    stand_in.calls.clear()
    distance = run("all_reduce", 10, two_shot=True)
    return [(call.tokens, call.one_shot) for call in stand_in.calls], distance, fell_back()


def deterministic(max_tokens: int, sizes: list[int], numerics: str) -> tuple[list[list[int]], int]:
    """What the bare all_reduce's strategy runs of each size, by its declaration; the workspace's capacity."""
    fresh()
    (strategy,) = [each for each in STRATEGIES if each.name == "flashinfer.all_reduce"]
    settings = strategy.settings(all_reduce, FusionConfig(numerics=numerics, max_tokens=max_tokens))
    found = []
    for size in sizes:
        x = torch.full((size, 256), float(dist.get_rank() + 1), dtype=torch.bfloat16)
        for _ in range(2):
            stand_in.calls.clear()
            total = strategy.impl(x, group=dist.group.WORLD.group_name, **settings)
            assert torch.equal(total, torch.full_like(x, 3.0))
        found.append([call.tokens for call in stand_in.calls])
    return found, next(iter(WORKSPACES.groups)).elements


def empty(lead: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of what no rows give, and no call of FlashInfer."""
    fresh()
    found = []
    for kernel in KERNELS:
        given = inputs(kernel, 0, 256, torch.bfloat16, 0.0, 0)
        if kernel.quantization == "nvfp4":
            continue
        shaped = [v.view(*lead, 256) if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in given.values()]
        results = getattr(torch.ops.fusion_flashinfer, kernel.name)(*shaped, dist.group.WORLD.group_name)
        found += [tuple(each.shape) for each in (results if isinstance(results, tuple) else (results,))]
    assert not stand_in.calls
    return found


def odd_memory() -> list[float]:
    """Inputs that are misaligned or strided on one rank alone."""
    fresh()
    rank, found = dist.get_rank(), []
    name = dist.group.WORLD.group_name
    for spoil in (
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        lambda t: t.t().contiguous().t(),
    ):
        given = inputs(BY_NAME["all_reduce_add_rms_norm"], 4, 256, torch.bfloat16, 0.0, rank)
        clean = torch.ops.fusion_flashinfer.all_reduce_add_rms_norm(*given.values(), name)
        if rank == 0:
            given |= {key: spoil(given[key]) for key in ("x", "residual")}
            given["weight"] = torch.cat([given["weight"][:1], given["weight"]])[1:]
        spoilt = torch.ops.fusion_flashinfer.all_reduce_add_rms_norm(*given.values(), name)
        found.append(max(float((a.float() - b.float()).abs().max()) for a, b in zip(clean, spoilt, strict=True)))
    return found


def fell_back() -> dict[str, str]:
    """Every strategy that runs unfused in the default group, and why."""
    reasons = {each.name: fallen_back(each.name, dist.group.WORLD.group_name) for each in STRATEGIES}
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


def growth(sizes: list[tuple[int, int]], captured_at: int | None = None) -> list[tuple[int, int]]:
    """Workspaces that hold memory, and their capacity, after each call of (tokens, hidden)."""
    fresh()
    found = []
    for index, (tokens, hidden) in enumerate(sizes):
        if index == captured_at:
            per_group.capturing = lambda: True  # type: ignore[assignment]
        try:
            assert run("all_reduce_add_rms_norm", tokens, hidden) <= 1
        finally:
            per_group.capturing = lambda: False  # type: ignore[assignment]
        held = next(iter(WORKSPACES.groups))
        found.append((len(stand_in.alive), held.elements))
    return found


def captured_first() -> tuple[float, list[str]]:
    """A first call during a capture: no workspace, no hang, a reason; then one outside."""
    fresh()
    per_group.capturing = lambda: True  # type: ignore[assignment]
    try:
        distance = run("all_reduce_rms_norm")
        assert not stand_in.alive
    finally:
        per_group.capturing = lambda: False  # type: ignore[assignment]
    reasons = [str(r) for r in fallen_back("flashinfer.all_reduce_rms_norm", dist.group.WORLD.group_name)]
    assert run("all_reduce_rms_norm") <= 1
    assert stand_in.calls
    return distance, reasons


def capacity(max_tokens: int) -> list[Any]:
    """Whether calls of max_tokens and of one more are fused, and the workspace's capacity in elements."""
    fresh()
    found: list[Any] = []
    for tokens in (max_tokens, max_tokens + 1):
        run("all_reduce", tokens, max_tokens=max_tokens)
        stand_in.calls.clear()
        assert run("all_reduce", tokens, max_tokens=max_tokens) <= 1
        found.append(bool(stand_in.calls))
    return [*found, next(iter(WORKSPACES.groups)).elements]


def two_groups() -> list[float]:
    """The default group and the groups of one rank's neighbours, each with a workspace that no other rank takes part in."""
    fresh()
    size, rank = dist.get_world_size(), dist.get_rank()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    mine = pairs[rank // 2].group_name
    found = []
    if rank < 2:  # the others never call on theirs
        found += [run("all_reduce_add_rms_norm", 4, group=mine), run("all_reduce", 5, 512, group=mine)]
    found += [run("all_reduce_add_rms_norm", 6), run("all_reduce_add_rms_norm", 3, dtype=torch.float32)]
    return found


def destroyed_group() -> tuple[int, int, list[float]]:
    """Workspaces that hold memory while a group lives and after it is gone; then the same group's name again."""
    fresh()
    group = dist.new_group(list(range(dist.get_world_size())))
    first = run("all_reduce", group=group.group_name)
    before = len(stand_in.alive)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    after = len(stand_in.alive)
    return before, after, [first, run("all_reduce")]


def disagreeing() -> str:
    """Ranks whose first calls are of different sizes: the real kernels would hang."""
    fresh()
    creation.ARRIVAL, creation.STEP = 30.0, 30.0
    kernel, x = BY_NAME["all_reduce"], torch.ones(4 + (1 << 13) * dist.get_rank(), 256)
    assert WORKSPACES.ready(kernel, x, dist.group.WORLD.group_name, None, False, False, False) is None
    (status,) = WORKSPACES.status()
    return status.state


def late(rank: int) -> str:
    """One rank that never comes to its first call."""
    fresh()
    creation.ARRIVAL, creation.STEP = 3.0, 3.0
    dist.barrier()  # so that the time limit counts from one moment
    kernel, x = BY_NAME["all_reduce"], torch.ones(4, 256)
    if dist.get_rank() == rank:
        dist.barrier()  # until the others have given up
        return "late"
    try:
        assert WORKSPACES.ready(kernel, x, dist.group.WORLD.group_name, None, False, False, False) is None
        (status,) = WORKSPACES.status()
        return status.state
    finally:
        dist.barrier()


def fp4_check() -> str:
    """The self-check of an FP4 kernel."""
    fresh()
    group = dist.group.WORLD.group_name
    run("all_reduce")
    x = torch.ones(4, 256, dtype=torch.bfloat16)
    ready = WORKSPACES.ready(BY_NAME["all_reduce"], x, group, None, False, False, False)
    assert ready is not None
    kernel = BY_NAME["all_reduce_add_rms_norm_nvfp4"]
    problem = self_check(kernel, ready, 5, 256, torch.bfloat16, torch.device("cpu"), group, pdl=False)
    return str(problem)


def state() -> list[str]:
    """What `fusion-core backends` would show."""
    return [str(each) for each in WORKSPACES.status()]
