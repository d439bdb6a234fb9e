"""What the workers of these tests run."""

from __future__ import annotations

import gc
import os
import sys
import time
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core import _cuda, fallback
from fusion_core.fallback import fallen_back
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary import all_reduce
from fusion_core.workspaces import Call
from fusion_core.workspaces.self_check import distance, exactly
from tests.workspaces.provider import BUFFERS, WORKSPACES, alive, calls, faults

PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
ADD = "all_reduce_add_rms_norm"
STRATEGY = "acme.kernel"


def fresh(step: float = 30.0, arrival: float = 30.0) -> None:
    """Forget what an earlier test left."""
    faults.clear()
    WORKSPACES.release()
    fallback._fallen_back.clear()
    WORKSPACES._unfused._paths.clear()
    alive.clear()
    calls.clear()
    BUFFERS.arrival, BUFFERS.step, BUFFERS.making = arrival, step, step


def world() -> str:
    return str(dist.group.WORLD.group_name)


def call_of(
    name: str = ADD, tokens: int = 4, hidden: int = 64, dtype: torch.dtype = torch.bfloat16, *, group: str = "",
    scalars: dict[str, Any] | None = None, **given: Any,
) -> Call:  # fmt: skip
    """A call with tensors of its own; x differs between ranks."""
    pattern, common = PATTERNS[name], torch.Generator().manual_seed(tokens)
    own = torch.Generator().manual_seed(1 + dist.get_rank() + 7 * tokens)
    tensors = {"x": torch.randn(tokens, hidden, generator=own).to(dtype)}
    if "residual" in pattern.tensors:
        tensors["residual"] = torch.randn(tokens, hidden, generator=common).to(dtype)
    if "weight" in pattern.tensors:
        tensors["weight"] = (torch.rand(hidden, generator=common) + 0.5).to(dtype)
    for scale in ("scale", "global_scale"):
        if scale in pattern.tensors:
            tensors[scale] = torch.full((1,), 1 / 32 if scale == "scale" else 32.0)
    defaults = {"eps": 1e-5, "weight_bias": 0.0} if "weight" in pattern.tensors else {}
    given.setdefault("strategy", STRATEGY)
    return Call(pattern, tensors=tensors, group=group or world(), scalars=defaults | (scalars or {}), **given)


def off(call: Call, results: dict[str, Tensor]) -> float:
    """How far results are from float64, in units of what their dtypes allow: up to 1 is right."""
    reduced = all_reduce(call.x.double(), call.group)
    exact = exactly(call.pattern, reduced, call.tensors, call.scalars)
    return distance(call.pattern, results, exact, {**call.tensors, **call.scalars})


def run(*sizes: Any, **given: Any) -> float:
    """One call: how far its results are off."""
    call = call_of(*sizes, **given)
    before = {name: tensor.clone() for name, tensor in call.tensors.items()}
    results = dict(WORKSPACES.run(call))
    assert all(torch.equal(before[name], tensor) for name, tensor in call.tensors.items()), "an input was written"
    return off(call, results) if call.x.numel() else 0.0


def fused(*sizes: Any, **given: Any) -> bool:
    """Whether such a call, which is right, runs its kernel when all is made and checked."""
    assert run(*sizes, **given) <= 1
    calls.clear()
    assert run(*sizes, **given) <= 1
    return bool(calls)


def reasons(strategy: str = STRATEGY) -> list[str]:
    """Why the strategy runs unfused in the default group."""
    return [f"{reason.code}: {reason}" for reason in fallen_back(strategy, world())]


def states() -> list[str]:
    return [each.state for each in WORKSPACES.status()]


Outcome = tuple[bool, list[str], list[str], int]
"""Whether later calls are fused; the strategy's reasons; the states; buffers that are left."""


def outcome(**given: Any) -> Outcome:
    """A first call, and later ones when nothing is wrong any more."""
    assert run(**given) <= 1
    faults.clear()
    later = [fused(tokens=tokens, **given) for tokens in (4, 5)]
    assert later[0] == later[1]
    return later[0], reasons(given.get("strategy", STRATEGY)), states(), len(alive)


def one_rank(where: str, kind: str, rank: int | None, step: float = 30.0, **given: Any) -> Outcome:
    """A fault on one rank, or on all of them."""
    fresh(step)
    if rank in (None, dist.get_rank()):
        faults[where] = kind
    found = outcome(**given)
    if kind == "late":  # until what was left behind has ended
        time.sleep(4.0)
        found = (*found[:3], len(alive))
    return found


def another_kernel_afterwards(kind: str, rank: int | None, step: float) -> tuple[Outcome, bool]:
    """A self-check that goes wrong; whether another kernel of the backend is used then."""
    found = one_rank("run one", kind, rank, step, strategy="acme.one", kernel="one")
    return found, fused(strategy="acme.two", kernel="two")


def first_calls() -> tuple[list[bool], list[tuple[str, tuple[int, ...]]], list[str], int]:
    """Several patterns, dtypes and sizes: what is fused; the first kernel's calls; the status; how many buffers."""
    fresh()
    assert run() <= 1
    first = list(calls)
    found = [
        fused(name, tokens, hidden, dtype, strategy=f"acme.{name}")
        for name in ("all_reduce", "all_reduce_rms_norm", ADD)
        for tokens, hidden, dtype in ((1, 64, torch.bfloat16), (5, 96, torch.float32), (3, 64, torch.float64))
    ]
    return found, first, [str(each) for each in WORKSPACES.status()], len(alive)


def collectives() -> tuple[int, int]:
    """Collectives of the group that a first call runs, which makes a workspace and checks its kernel; and an unfused one."""
    fresh()

    def run_by(call: Call) -> int:
        before = dist.group.WORLD._get_sequence_number_for_group()
        WORKSPACES.run(call)
        return int(dist.group.WORLD._get_sequence_number_for_group() - before)

    return run_by(call_of()), run_by(call_of(tokens=7))


def none_taken() -> tuple[bool, bool, list[str]]:
    """A call that the workspace does not take, another one, the reasons; and one without rows."""
    fresh()
    assert run(tokens=0) == 0.0
    assert not list(WORKSPACES.status()), "nobody has anything to send"
    return fused(tokens=7), fused(tokens=8), reasons()


def growth(sizes: list[tuple[int, int]], captured_at: int | None = None, fails_at: int | None = None) -> list[Any]:
    """For each call of (tokens, hidden): whether it is fused, and the bytes of the buffers."""
    fresh()
    found = []
    for index, (tokens, hidden) in enumerate(sizes):
        if index == captured_at:
            with mock.patch.object(_cuda, "is_capturing", return_value=True):
                assert run(tokens=tokens, hidden=hidden) <= 1
        if index == fails_at and dist.get_rank() == 1:
            faults["create"] = "raise"
        found.append((fused(tokens=tokens, hidden=hidden), sorted(each.size for each in alive)))
    return found


def captured_first() -> tuple[list[str], bool, bool]:
    """A first call in a capture; one outside; another kernel's in a capture."""
    fresh()
    with mock.patch.object(_cuda, "is_capturing", return_value=True):
        assert run() <= 1
        assert not calls
        assert not list(alive)
    early, outside = reasons(), fused()
    with mock.patch.object(_cuda, "is_capturing", return_value=True):
        assert fused()
        return early, outside, fused(strategy="acme.other")


def capacity(max_tokens: int | None) -> list[int]:
    fresh()
    run(tokens=40, hidden=256, max_tokens=max_tokens)
    return [each.size for each in alive]


def groups() -> tuple[list[bool], int, int]:
    """Two groups of all ranks; buffers while both live, and when one is destroyed."""
    fresh()
    group = dist.new_group(list(range(dist.get_world_size())))
    found = [fused(), fused(group=group.group_name), fused(tokens=9)]
    before = len(alive)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return found, before, len(alive)


def released() -> list[tuple[int, int]]:
    """Buffers and lines of status: in use, given back, in use again."""
    fresh()
    found = []
    for step in (run, WORKSPACES.release, run):
        step()
        found.append((len(alive), len(list(WORKSPACES.status()))))
    return found


def free_raises() -> list[str]:
    """What is warned of where a buffer cannot be given back on one rank."""
    fresh()
    run()
    if dist.get_rank() == 1:
        faults["free"] = "raise"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WORKSPACES.release()
    faults.clear()
    assert fused()
    return [str(each.message) for each in caught]


def differing(what: str) -> tuple[bool, list[str]]:
    """Ranks that ask for different things."""
    fresh()
    if what == "version" and dist.get_rank() == 1:
        faults["version"] = "2"
    tokens = 4 + dist.get_rank() if what == "call" else 4
    call = call_of(tokens=tokens)
    return WORKSPACES.ready(call) is None, reasons()


def absent(rank: int) -> tuple[list[str], float]:
    """One rank that never comes to its first call: the reasons, and how long the others waited."""
    fresh(step=2.0, arrival=2.0)
    dist.barrier()
    if dist.get_rank() == rank:
        dist.barrier()
        return ["absent"], 0.0
    start = time.monotonic()
    assert WORKSPACES.ready(call_of()) is None
    took = time.monotonic() - start
    dist.barrier()
    return reasons(), took


def dies(where: str, rank: int, port: int) -> None:
    """In a process of its own, of which rank 1's ends in its own code: prints what the other one gets."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # the test's: it outlives both ranks
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    # on a busy machine a rank is late by seconds before it comes to its fault
    fresh(step=10.0, arrival=3.0 if where == "facts" else 60.0)
    dist.barrier()
    if rank == 1:
        faults[where] = "die"
    sys.stdout.write(f"{WORKSPACES.ready(call_of())} {reasons()}")
    sys.stdout.flush()
    os._exit(0)  # a store without its other process would be waited for


def zeros() -> tuple[bool, bool, bool, int]:
    """Whether zeros are one buffer, stay zeros and are kept for a graph when larger ones come; bytes that they take."""
    fresh()
    run("all_reduce_rms_norm")
    workspace = WORKSPACES.ready(call_of("all_reduce_rms_norm"))
    assert workspace is not None
    small, same = (workspace.zeros(torch.empty(size, 64, dtype=torch.bfloat16)) for size in (4, 3))
    large = workspace.zeros(torch.empty(1 << 15, 64, dtype=torch.bfloat16))
    clean = not any(bool(each.any()) for each in (small, same, large))
    kept = any(each.data_ptr() == small.data_ptr() for each in workspace._all_zeros._outgrown)
    (status,) = WORKSPACES.status()
    return small.data_ptr() == same.data_ptr(), clean, kept, status.memory - alive[0].size


Form = tuple[tuple[int, ...], list[int]]


def _form(tensor: Tensor) -> Form:
    """Shape, and strides of what is larger than 1."""
    return tuple(tensor.shape), [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def unfused(name: str, scalars: dict[str, Any], tokens: list[int]) -> list[tuple[float, list[tuple[str, Form, Form]]]]:
    """The unfused path of a pattern: how far off it is; shape and stride of each result, and by the definition."""
    fresh()
    found = []
    for size in tokens:
        call = call_of(name, size, 256, scalars=scalars, outputs=PATTERNS[name].returns)  # the sum is not among them
        before = call.x.clone()
        results = WORKSPACES.unfused(call)
        assert torch.equal(before, call.x), "x was written"
        defined = call.pattern.function(**call.tensors, **call.scalars, group=call.group)
        defined = defined if isinstance(defined, tuple) else (defined,)
        exact = dict(zip(call.pattern.outputs, defined, strict=True))
        forms = [(key, _form(result), _form(exact[key])) for key, result in results.items()]
        found.append((off(call, dict(results)) if size else 0.0, forms))
    return found
