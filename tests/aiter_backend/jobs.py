"""What the workers of `test_communicators` run: the life of a communicator."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import fusion_aiter
from fusion_aiter import creation, stages
from fusion_aiter.communicators import COMMUNICATORS
from fusion_aiter.kernels import KERNELS
from fusion_core import Device, fallback
from tests.aiter_backend.one_call import (
    BY_NAME,
    call,
    captured,
    communicator_class,
    inputs,
    kernels,
    reasons,
    record,
    recorded,
    run,
    runs_fused,
    sizes_made,
    world,
)

AITER: Any = COMMUNICATORS.provider
ADD = "all_reduce_add_rms_norm"
NORM = "all_reduce_rms_norm"


def on(arch: str, job: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A job in a process whose CPU counts as this GPU, which has forgotten the jobs before."""
    os.environ["GPU_ARCHS"] = arch
    importlib.import_module("tests.aiter_backend.as_amd")
    importlib.import_module("aiter.dist.device_communicators.custom_all_reduce")
    creation.CLOSING = 10.0
    COMMUNICATORS.release()
    vars(AITER).clear()
    creation._left_open.clear()
    fallback._fallen_back.clear()
    record().clear()
    return job(*args, **kwargs)


def held() -> Any:
    """What the one group that was used has."""
    (found,) = COMMUNICATORS._groups
    return found


def first_calls() -> tuple[Any, ...]:
    """The constructor's calls after one operator and after three more, and the backend of the group it got."""
    found = []
    for names in ((ADD,), (ADD, NORM, "all_reduce")):
        for name in names:
            assert run(name, 4) <= 1
        found.append([each["kwargs"] for each in recorded("__init__")])
    own = held().handle.group
    return *found, dist.get_backend(own), own is dist.group.WORLD, dist.get_process_group_ranks(own)


def everything() -> list[dict[str, Any]]:
    """All calls of AITER after every kernel ran, in two forms."""
    for kernel in KERNELS:
        bias = 1.0 if kernel.gemma else 0.0
        for tokens in (1, 6):
            assert run(kernel.name, tokens, bias=bias) <= 1, kernel.name
    assert {each["method"] for each in kernels()} == {kernel.method for kernel in KERNELS}
    return record()


def bounded(calls: list[tuple[int, int]], max_tokens: int | None) -> list[tuple[bool, list[int], int]]:
    """For each call of (tokens, hidden): whether it was fused; the sizes made and how many were closed by then."""
    found = []
    for tokens, hidden in calls:
        fused = runs_fused(ADD, tokens, hidden, max_tokens=max_tokens)
        found.append((fused, sizes_made(), len(recorded("close"))))
    return found


def grown_after_a_capture() -> list[tuple[int, int, bool]]:
    """Communicators made and closed: after a captured call, after a larger one, after a larger one still, at the end."""
    found = []

    def note() -> None:
        found.append((len(sizes_made()), len(recorded("close")), all(each.communicator._ptr for each in old)))

    old: list[Any] = []
    assert run(ADD, 4, max_tokens=100) <= 1
    with captured():
        assert run(ADD, 4, max_tokens=100) <= 1
    old.append(held().handle)
    note()
    assert run(ADD, 100, 8192, max_tokens=100) <= 1
    note()
    assert run(ADD, 300, 8192, max_tokens=300) <= 1
    note()
    fusion_aiter.release()
    note()
    return found


def captured_first(name: str) -> tuple[Any, ...]:
    """A first call during a capture, one outside, one more during a capture, of the same form and of another kernel."""
    with captured():
        early = run(name)
    unmade = (list(record()), reasons(name))
    assert run(name) <= 1
    record().clear()
    with captured():
        assert run(name) <= 1
        known = len(kernels())
        assert run("all_reduce") <= 1
    return early, unmade, known, len(kernels()), reasons("all_reduce")


def shapes() -> list[str]:
    """Leading dimensions and layouts of scales, of every kernel: what is off, or was not fused."""
    off = []
    for kernel in KERNELS:
        for tokens, lead in ((6, (2, 3)), (1, ()), (6, (3, 1, 2)), (5, None)):
            for transposed in (False, True) if kernel.quantization == "group_fp8" else (False,):
                flags = {"transposed": transposed} if transposed else {}
                record().clear()
                far = run(kernel.name, tokens, lead=lead, **flags)
                if far > 1 or not kernels(tokens):
                    off.append(f"{kernel.name} {lead} {transposed}: {far}, {len(kernels(tokens))} calls")
                if any(len(each["kwargs"]["inp"]["shape"]) != 2 for each in kernels()):
                    off.append(f"{kernel.name} {lead}: not of two dimensions")
    return off


def _misaligned(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def _strided(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2]


def odd_memory() -> list[str]:
    """Inputs that are misaligned or strided on one rank alone: what is off."""
    off = []
    for kernel in KERNELS:
        assert run(kernel.name) <= 1
        for spoil in (_misaligned, _strided):
            record().clear()
            far = run(kernel.name, spoil=spoil) if dist.get_rank() == 1 else run(kernel.name)
            if far > 1 or len(kernels()) != 1:
                off.append(f"{kernel.name} {spoil.__name__}: {far}, {len(kernels())} calls")
    return off


def empty(after: bool) -> tuple[list[tuple[int, ...]], int]:
    """Shapes of what no rows give, first or after some did; how many communicators there are."""
    found = []
    for kernel in KERNELS:
        if after:
            assert run(kernel.name) <= 1
            record().clear()
        for lead in ((0,), (2, 0)):
            tensors = inputs(kernel, 0, 512, torch.bfloat16, 0)
            given = {key: value if key == "weight" else value.view(*lead, 512) for key, value in tensors.items()}
            found += [tuple(each.shape) for each in call(kernel, given, world()).values()]
        assert reasons(kernel.name) == []
        assert record() == []
    return found, len(list(COMMUNICATORS.status()))


def too_large(most: int, tokens: list[int]) -> list[bool]:
    """Whether calls are fused where AITER's callers stop at ``most`` bytes."""
    with mock.patch.object(stages, "MOST", most):
        return [runs_fused(NORM, each) for each in tokens]


def zeros_given() -> tuple[bool, bool, bool, bool]:
    """Of a pattern without residual: whether AITER got zeros, from one buffer; whether that stays; whether it lasts.

    The last: a CUDA graph holds the buffer's address when a larger one comes.
    """
    given: list[Tensor] = []
    plain = communicator_class().fused_ar_rms

    def spy(self: Any, **kwargs: Any) -> Any:
        given.append(kwargs["res_inp"])
        return plain(self, **kwargs)

    with mock.patch.object(communicator_class(), "fused_ar_rms", spy):
        assert run(NORM, 4) <= 1
        given.clear()
        assert run(NORM, 4) <= 1
        assert run(NORM, 3) <= 1
        with captured():
            assert run(NORM, 3) <= 1
        zeros = all(not residual.any() for residual in given)
        one = len({residual.data_ptr() for residual in given}) == 1
        graphs = weakref.ref(held().zeros._buffers[torch.bfloat16])
        given.clear()
        assert run(NORM, 3000) <= 1  # beyond the first buffer
    gc.collect()
    same = all(not each.any() for each in held().zeros._buffers.values())
    return zeros, one, same, graphs() is not None and not graphs().any()


def groups_in_turn() -> list[tuple[float, float]]:
    """Pairs and the whole world, whose ranks come to them in another order; then a second size of each."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([first, first + 1]) for first in range(0, size, 2)]
    mine = pairs[rank // 2].group_name
    order = [mine, ""] if rank < 2 else ["", mine]
    found = [(run(ADD, 4, group=group), run(NORM, 5, 1024, group=group)) for group in order]
    found += [(run(ADD, 6, group=group), run("all_reduce", 3, group=group)) for group in ("", mine)]
    assert len(sizes_made()) == 2
    assert [each for each in record() if each["error"]] == []
    return found


def odd_counts(more: int) -> tuple[bool, list[int]]:
    """Ranks that have made other numbers of communicators before: whether a call is fused, and their numbers then."""
    pool = sys.modules["aiter.dist.device_communicators.custom_all_reduce"].IPCBufferPool
    pool._pool_seq += more * dist.get_rank()
    fused = runs_fused(ADD)
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, pool._pool_seq)
    return fused, numbers


def destroyed_group() -> tuple[int, int, list[str], list[float]]:
    """Communicators that are open while a group lives and after it is gone; the status; then another group."""
    group = dist.new_group(list(range(dist.get_world_size())))
    first = run("all_reduce", group=group.group_name)
    before = len(recorded("__init__")) - len(recorded("close"))
    dist.destroy_process_group(group)
    del group
    gc.collect()
    after = len(recorded("__init__")) - len(recorded("close"))
    status = [str(each) for each in COMMUNICATORS.status()]
    return before, after, status, [first, run("all_reduce")]


def released_apart(seconds: float) -> tuple[float, float]:
    """One rank gives its communicator back later than the others: when this one began, and when it had closed."""
    assert run(ADD) <= 1
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(seconds)
    start = time.monotonic()
    fusion_aiter.release()
    assert len(recorded("close")) == 1
    return start, time.monotonic()


def released_alone() -> tuple[int, int, bool, int]:
    """Rank 0 gives its communicator back, the other not in time: what was closed, what is kept; then a new one."""
    creation.CLOSING = 1.0
    assert run(ADD) <= 1
    if dist.get_rank() == 0:
        fusion_aiter.release()
    dist.barrier()
    start = time.monotonic()
    fusion_aiter.release(world())
    assert time.monotonic() - start < 0.8, "what the others have decided is known at once"
    closed, kept = len(recorded("close")), len(creation._left_open)
    return closed, kept, runs_fused(ADD), len(sizes_made())


def released() -> list[tuple[int, int, int, int]]:
    """Communicators made and closed, lines of status, calls of kernels: in use, given back, in use again."""
    found = []

    def note() -> None:
        found.append((len(sizes_made()), len(recorded("close")), len(list(COMMUNICATORS.status())), len(kernels()) > 0))
        record()[:] = [each for each in record() if each["method"] in ("__init__", "close")]

    assert run(ADD) <= 1
    note()
    fusion_aiter.release()
    note()
    assert run(ADD) <= 1
    note()
    return found


def status() -> list[list[tuple[str, int, str]]]:
    """The status before the first call, after one, and after one that needs zeros."""

    def now() -> list[tuple[str, int, str]]:
        lines = [(each.subject, each.memory, each.state) for each in fusion_aiter.fusion_status(Device("cpu"))]
        return [line for line in lines if line[0].startswith("communicator")]

    found = [now()]
    for name in (ADD, NORM):
        assert run(name) <= 1
        found.append(now())
    return found


def warned() -> list[str]:
    """What is warned of while two communicators are made on a ROCm release that is known to be bad."""
    creation._warn_of_runtime.cache_clear()
    with (
        mock.patch.object(creation, "known_bad_runtime", return_value="ROCm is 7.2.0"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            assert runs_fused(ADD)
            fusion_aiter.release()
    return [f"{each.category.__name__}: {each.message}" for each in caught]


def stages_run(table: list[tuple[str, int, int, bool]]) -> list[bool | None]:
    """For each (kernel, hidden, tokens, asked for one stage): ``use_1stage`` of its call; None where none came."""
    found = []
    for name, hidden, tokens, one_stage in table:
        record().clear()
        assert run(name, tokens, hidden, one_stage=one_stage) <= 1, (name, hidden, tokens)
        asked = {each["kwargs"].get("use_1stage") for each in kernels(tokens)}
        found.append(asked.pop() if len(asked) == 1 else None)
    return found


def narrow_rows() -> bool:
    """Whether rows of four float32 are fused: one load each, and none of the sizes that groups have."""
    return runs_fused(ADD, 3, 4, dtype=torch.float32)


def wide_rows() -> list[bool]:
    """Whether calls are fused: of narrow rows, then of rows of which a few are more than the communicator holds."""
    assert BY_NAME["all_reduce"].adds is False
    return [runs_fused(ADD, 4, max_tokens=4), runs_fused("all_reduce", 1, 1 << 18, max_tokens=4)]
