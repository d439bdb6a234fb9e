"""What the workers of these tests run, over the stand-in."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist

import fusion_reference
from fusion_core import _cuda
from fusion_core.fallback import fallen_back
from fusion_core.patterns.plain import all_reduce
from fusion_core.workspaces import Call
from fusion_reference import symm_mem
from fusion_reference.buffers import BUFFERS, MEMORY, strategy
from fusion_reference.ops import OPERATORS
from tests.reference_backend import stand_in
from tests.reference_backend.one_call import given, off, run, world

stand_in.install()


def fresh() -> None:
    """Forget what an earlier test left."""
    BUFFERS.release()
    for name in ("least", "most", "arrival", "step", "making", "spoilt"):
        vars(MEMORY).pop(name, None)
    MEMORY.spoilt = None
    for names in (stand_in.fails_to_allocate, stand_in.fails_to_exchange, stand_in.slow_to_exchange, stand_in.wrong, stand_in.calls, stand_in.multicast, stand_in.patience):  # fmt: skip
        names.clear()


def state() -> str:
    """The default group's line of the status."""
    (status,) = BUFFERS.status()
    return status.state


def call_of(kernel: str, x: torch.Tensor) -> Call:
    """A call of a kernel in the default group."""
    return Call(all_reduce, strategy(kernel), {"x": x}, world(), kernel=kernel)


def fused(kernel: str, *args: Any, **kwargs: Any) -> bool:
    """Whether a call, right in any case, went through the kernel."""
    stand_in.calls.clear()
    assert run(kernel, *args, **kwargs) <= 1
    return bool(stand_in.calls)


def every_form(kernels: list[str], rows: list[tuple[int, int]]) -> list[str]:
    """Every kernel at these sizes: what is off."""
    fresh()
    found = []
    for kernel in kernels:
        for dtype in (torch.bfloat16, torch.float32):
            for tokens, hidden in rows:
                for _ in range(2):
                    if (distance := run(kernel, tokens, hidden, dtype)) > 1:
                        found.append(f"{kernel} {tokens}x{hidden} {dtype}: {distance}")
        if run(kernel, 6, lead=(2, 3)) > 1:
            found.append(f"{kernel}: leading dimensions")
    assert {call.kernel for call in stand_in.calls} == set(kernels)
    assert state() == "in use"
    return found


def empty() -> list[tuple[int, ...]]:
    """Shapes of what no rows give; no buffer is made for them."""
    fresh()
    shapes = [(0, 64), (2, 0, 64)]
    found = [tuple(OPERATORS[k](torch.ones(s), world()).shape) for k in symm_mem.KERNELS for s in shapes]
    assert not stand_in.calls
    assert not list(BUFFERS.status())
    return found


def odd_memory() -> list[bool]:
    """Inputs that are misaligned, strided, or want gradients on one rank alone: whether they give the same bits."""
    fresh()
    found = []
    x = given((8, 64), torch.bfloat16, dist.get_rank())
    for kernel in symm_mem.KERNELS:
        clean = OPERATORS[kernel](x, world())
        for spoil in (
            lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
            lambda t: t.t().contiguous().t(),
            lambda t: torch.stack([t, t], -1)[..., 0],
            lambda t: t.clone().requires_grad_(),
        ):
            spoilt = OPERATORS[kernel](spoil(x) if dist.get_rank() == 0 else x, world())
            assert spoilt.is_contiguous()
            found.append(torch.equal(clean, spoilt))  # of a gradient torch says that there is none
    assert not any(piece.requires_grad for state in BUFFERS._groups for piece in state.handle._pieces.values()), (
        "the buffer holds their graph"
    )
    return found


def modes() -> list[float]:
    """A first call for inference, later ones without; and the same form again."""
    fresh()
    with torch.inference_mode():
        found = [run("one_shot", 4, 64), run("two_shot", 5, 64)]
    return [*found, run("one_shot", 4, 64), run("two_shot", 5, 64)]


def back_to_back() -> list[float]:
    """Results that are looked at only when all calls are done: none may lie in the buffer."""
    fresh()
    inputs = [given((4 + n, 64), torch.float32, dist.get_rank() + 100 * n) for n in range(6)]
    found = [(x, OPERATORS[kernel](x, world())) for x in inputs for kernel in symm_mem.KERNELS]
    assert state() == "in use"
    return [off(x, result) for x, result in found]


def one_rank_fails(rank: int, where: str) -> tuple[float, list[str], str, list[int], int]:
    """A buffer that comes up on all ranks but one: the result, the reasons, the status, what is left, exchanges."""
    fresh()
    getattr(stand_in, where).add(rank)
    exchanges = MEMORY.exchanges
    distance = run("one_shot")
    getattr(stand_in, where).clear()
    again = run("two_shot", 7)
    reasons = [str(fallen_back(f"reference.symm_mem_{k}", world())[-1]) for k in symm_mem.KERNELS]
    assert not stand_in.calls, "remembered: nobody tries again"
    gc.collect()
    return max(distance, again), reasons, state(), stand_in.alive(), MEMORY.exchanges - exchanges


def after_a_failed_exchange() -> tuple[str, str]:
    """A failed exchange, then a call on another group: the states of both."""
    fresh()
    stand_in.fails_to_exchange.add(1)
    run("one_shot")
    stand_in.fails_to_exchange.clear()
    group = dist.new_group(list(range(dist.get_world_size())))
    assert run("one_shot", group=group.group_name) <= 1
    first, second = (status.state for status in BUFFERS.status())
    return first, second


def slow(rank: int) -> tuple[float, str]:
    """A rank that does not come out of the exchange in time."""
    fresh()
    MEMORY.step = 2.0
    stand_in.slow_to_exchange[rank] = 10.0
    return run("one_shot"), state()


def environment(before: str | None) -> tuple[list[str | None], str | None, list[float], float]:
    """What an exchange sees of multicast and of the store's time limit, and what is there afterwards."""
    fresh()
    os.environ.pop(symm_mem.NO_MULTICAST, None)
    if before is not None:
        os.environ[symm_mem.NO_MULTICAST] = before
    store = dist.distributed_c10d._get_process_group_store(dist.group.WORLD)
    run("one_shot")
    return stand_in.multicast, os.environ.get(symm_mem.NO_MULTICAST), stand_in.patience, store.timeout.total_seconds()


def wrong_kernel() -> tuple[float, str, bool]:
    """A kernel that is wrong on this machine: the result, the status, and whether the other one goes on."""
    fresh()
    stand_in.wrong.add("two_shot")
    distance = run("two_shot")
    return distance, state(), fused("one_shot")


def growth(sizes: list[tuple[int, int]], captured_at: int | None = None) -> list[tuple[list[int], int]]:
    """Bytes of the buffers that are held, and what the status says, after each call of (tokens, hidden)."""
    fresh()
    MEMORY.least = 1 << 20
    found = []
    for index, (tokens, hidden) in enumerate(sizes):
        if index == captured_at:
            _cuda.is_capturing = lambda: True
        try:
            assert fused("one_shot", tokens, hidden)
        finally:
            _cuda.is_capturing = lambda: False
        gc.collect()
        (status,) = BUFFERS.status()
        found.append((stand_in.alive(), status.memory))
    return found


def growth_fails(rank: int) -> tuple[list[bool], str]:
    """Whether calls are fused: small, too large for what one rank has memory for, small again; and the status."""
    fresh()
    MEMORY.least = 1 << 20
    found = []
    for tokens in (4, 5000, 5001, 6):  # the last in a form of its own
        if tokens == 5000:
            stand_in.fails_to_allocate.add(rank)
        found.append(fused("one_shot", tokens, 512))
    return found, state()


def capacity(max_tokens: int | None) -> tuple[list[bool], int]:
    """Whether calls of 40 and of 41 rows are fused, and the buffer's bytes."""
    fresh()
    found = [fused("one_shot", tokens, 4096, torch.float32, max_tokens=max_tokens) for tokens in (40, 41)]
    return found, next(iter(BUFFERS._groups)).size


def the_largest() -> list[bool]:
    """Whether calls at and above the largest buffer are fused."""
    fresh()
    MEMORY.least, MEMORY.most = 1 << 18, 1 << 20
    return [fused("one_shot", tokens, 1024) for tokens in (512, 513, 512)]


def captured_first() -> tuple[float, list[str], bool]:
    """A first call during a capture: no buffer, no hang, a reason; then one outside."""
    fresh()
    _cuda.is_capturing = lambda: True
    try:
        distance = run("two_shot")
        assert not stand_in.calls
        assert not stand_in.multicast, "nothing was exchanged"
    finally:
        _cuda.is_capturing = lambda: False
    reasons = [str(r) for r in fallen_back("reference.symm_mem_two_shot", world())]
    return distance, reasons, fused("two_shot")


def overlapping_groups() -> tuple[list[float], str]:
    """A pair of ranks first, then all of them: torch would look for each other under other names, for ever."""
    fresh()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)]
    found = []
    if dist.get_rank() < 2:  # the others never call on theirs
        found += [run("one_shot", group=pairs[0].group_name)]
        assert stand_in.calls
    found += [run("one_shot", 6)]
    return found, [status.state for status in BUFFERS.status()][-1]


def disjoint_groups() -> list[bool]:
    """Two pairs of ranks, then all of them."""
    fresh()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, dist.get_world_size(), 2)]
    mine = pairs[dist.get_rank() // 2].group_name
    return [fused("one_shot", group=mine), fused("two_shot", 6), fused("two_shot", 7, group=mine)]


def destroyed_group() -> tuple[int, int, list[float]]:
    """Buffers while a group lives and after it is gone; then another group."""
    fresh()
    group = dist.new_group(list(range(dist.get_world_size())))
    first = run("one_shot", group=group.group_name)
    gc.collect()
    before = len(stand_in.alive())
    dist.destroy_process_group(group)
    del group
    gc.collect()
    after = len(stand_in.alive())
    return before, after, [first, run("one_shot")]


def released() -> tuple[int, int, bool]:
    """Buffers before and after `fusion_reference.release`, and whether the next call makes one."""
    fresh()
    run("one_shot")
    before = len(stand_in.alive())
    fusion_reference.release(world())
    gc.collect()
    return before, len(stand_in.alive()), fused("one_shot")


def disagreeing() -> str:
    """Ranks whose first calls are of different sizes: the real kernels would hang."""
    fresh()
    MEMORY.arrival = MEMORY.step = 30.0
    x = torch.ones(4 + (1 << 13) * dist.get_rank(), 256)
    assert BUFFERS.ready(call_of("one_shot", x)) is None
    return state()


def late(rank: int) -> str:
    """One rank that never comes to its first call."""
    fresh()
    MEMORY.arrival = MEMORY.step = 3.0
    dist.barrier()  # so that the time limit counts from one moment
    if dist.get_rank() == rank:
        dist.barrier()  # until the others have given up
        return "late"
    try:
        assert BUFFERS.ready(call_of("one_shot", torch.ones(4, 256))) is None
        return state()
    finally:
        dist.barrier()
