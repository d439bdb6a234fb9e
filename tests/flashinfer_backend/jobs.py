"""What the workers of these tests run, over the stand-in."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist

from fusion_core import FusionConfig, _cuda, fallback
from fusion_core.fallback import fallen_back
from fusion_core.patterns.plain import all_reduce
from fusion_flashinfer import launch
from fusion_flashinfer.kernels import KERNELS
from fusion_flashinfer.limits import MOST
from fusion_flashinfer.workspaces import WORKSPACES
from tests.flashinfer_backend import stand_in
from tests.flashinfer_backend.forms import variants
from tests.flashinfer_backend.one_call import BY_NAME, inputs, run

stand_in.install()
TIMES: Any = WORKSPACES.provider


def elements() -> int:
    """Of 16 bits: what the workspace takes."""
    return next(iter(WORKSPACES._groups)).size // 2


def fresh(most: int = MOST) -> None:
    """Forget what an earlier test left; take so many bytes in one launch."""
    WORKSPACES.release()
    fallback._fallen_back.clear()
    for names in (stand_in.fails_to_create, stand_in.wrong, stand_in.calls, stand_in.past, stand_in.alive):
        names.clear()
    stand_in.multicast = stand_in.moved = False
    launch.MOST = most
    TIMES.arrival, TIMES.step = 900.0, 90.0


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


def parts(most: int, sizes: list[int], names: list[str] | None = None, **where: Any) -> dict[str, list[list[int]]]:
    """For each kernel, or those of these names, and each number of tokens, how many of them each launch took."""
    fresh(most * 256 * 2)
    names = names or [kernel.name for kernel in KERNELS if kernel.quantization != "nvfp4"]
    return {name: [[call.tokens for call in calls_of(name, size, **where)] for size in sizes] for name in names}


def parts_with_leading_dimensions(name: str) -> tuple[float, list[tuple[int, bool]]]:
    """An input of three dimensions in parts, the last of which two-shot does not take: the distance; what ran."""
    fresh(4 * 256 * 2)
    run(name, 9, lead=(3, 3), two_shot=True)
    stand_in.calls.clear()
    return run(name, 9, lead=(3, 3), two_shot=True), [(call.tokens, call.one_shot) for call in stand_in.calls]


def deterministic(max_tokens: int, sizes: list[int], numerics: str) -> tuple[list[list[int]], int]:
    """What the bare all_reduce's strategy runs of each size, by its declaration; the workspace's capacity."""
    fresh()
    (strategy,) = [each for each in variants() if each.name == "flashinfer.all_reduce"]
    settings = strategy.settings(all_reduce, FusionConfig(numerics=numerics, max_tokens=max_tokens))
    found = []
    for size in sizes:
        x = torch.full((size, 256), float(dist.get_rank() + 1), dtype=torch.bfloat16)
        for _ in range(2):
            stand_in.calls.clear()
            total = strategy.impl(x, group=dist.group.WORLD.group_name, **settings)
            assert torch.equal(total, torch.full_like(x, 3.0))
        found.append([call.tokens for call in stand_in.calls])
    return found, elements()


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


def growth(sizes: list[tuple[int, int]], captured_at: int | None = None) -> list[tuple[int, int]]:
    """Workspaces that hold memory, and their capacity, after each call of (tokens, hidden)."""
    fresh()
    found = []
    for index, (tokens, hidden) in enumerate(sizes):
        if index == captured_at:
            _cuda.is_capturing = lambda: True  # type: ignore[assignment]
        try:
            assert run("all_reduce_add_rms_norm", tokens, hidden) <= 1
        finally:
            _cuda.is_capturing = lambda: False  # type: ignore[assignment]
        found.append((len(stand_in.alive), elements()))
    return found


def captured_first() -> tuple[float, list[str]]:
    """A first call during a capture: no workspace, no hang, a reason; then one outside."""
    fresh()
    _cuda.is_capturing = lambda: True  # type: ignore[assignment]
    try:
        distance = run("all_reduce_rms_norm")
        assert not stand_in.alive
    finally:
        _cuda.is_capturing = lambda: False  # type: ignore[assignment]
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
    return [*found, elements()]


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


def state() -> list[str]:
    """What `fusion-core backends` would show."""
    return [str(each) for each in WORKSPACES.status()]
