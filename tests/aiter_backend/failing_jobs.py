"""What the workers of `test_communicator_failures` run: what goes wrong on one rank, or on this machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import fusion_aiter
from fusion_aiter import creation, library
from fusion_aiter.communicators import COMMUNICATORS
from fusion_aiter.kernels import Kernel
from fusion_core.workspaces import Call
from tests.aiter_backend.jobs import ADD, AITER, NORM, held
from tests.aiter_backend.one_call import (
    BY_NAME,
    communicator_class,
    kernels,
    reasons,
    record,
    recorded,
    run,
    runs_fused,
    sizes_made,
)

TOKEN_FP8 = "all_reduce_add_rms_norm_token_fp8"

Outcome = tuple[float, list[tuple[str, str]], list[str], int, int]
"""How far off, reasons of the strategy, states, calls of kernels, communicators that are left open."""


def outcome(name: str = ADD) -> Outcome:
    """Two calls that run unfused."""
    distance = max(run(name), run(name, 7))
    return distance, reasons(name), states(), len(kernels()), len(creation._left_open)


def states() -> list[str]:
    """Of each communicator."""
    return [each.state for each in COMMUNICATORS.status()]


class _Raises:
    """An importer that finds AITER, which raises as it is run."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "aiter":
            return None
        found = PathFinder.find_spec(name)

        def exec_module(module: Any) -> None:
            raise self.error

        found.loader.exec_module = exec_module  # type: ignore[union-attr,method-assign]
        return found


def import_fails(rank: int, error: Exception) -> tuple[Outcome, list[tuple[str, str]], bool]:
    """One rank whose AITER does not import; another kernel's reasons; whether a later one, where it does, is fused."""
    with ExitStack() as stack:
        if dist.get_rank() == rank:
            stack.enter_context(mock.patch.dict(sys.modules))
            for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
                del sys.modules[name]
            stack.enter_context(mock.patch.object(sys, "meta_path", [_Raises(error), *sys.meta_path]))
            library.module.cache_clear()
        distance = max(run(ADD), run(ADD, 7), run(NORM))
        found = (distance, reasons(ADD), states(), 0, len(creation._left_open)), reasons(NORM)
    library.module.cache_clear()
    assert record() == [], "nobody made anything"
    fusion_aiter.release()
    return *found, runs_fused(ADD)


def over_a_file(path: str) -> Outcome:
    """The default process group meets over a FileStore."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=Path(path).as_uri(), rank=rank, world_size=size)
    return outcome()


@contextmanager
def settings(**given: str) -> Iterator[None]:
    """Of AITER's, by the part of their names that differs."""
    with mock.patch.dict(os.environ, {f"AITER_CUSTOM_AR_{name}_SIZE": value for name, value in given.items()}):
        yield


def window(given: dict[str, str], tokens: list[int]) -> tuple[list[bool], list[tuple[str, str]]]:
    """Whether calls of so many rows of 1 KiB are fused under settings that all ranks have, and the reasons."""
    with settings(**given):
        return [runs_fused(ADD, each) for each in tokens], reasons(ADD)


def other_window(rank: int) -> Outcome:
    """One rank has a setting of its own."""
    with settings(**({"MAX": "4096"} if dist.get_rank() == rank else {})):
        return outcome()


@contextmanager
def constructor(kind: str, above: int = 0) -> Iterator[None]:
    """AITER's constructor, which fails for more than so many bytes: before it meets the others, after, or in silence."""
    plain = communicator_class().__init__

    def fails(self: Any, **given: Any) -> None:
        bad = given["max_size"] > above
        if kind == "before" and bad:
            raise RuntimeError("hipIpcGetMemHandle: out of memory")
        plain(self, **given)
        self.disabled = kind == "disabled" and bad
        if kind == "after" and bad:
            raise RuntimeError("hipIpcOpenMemHandle: invalid device context")

    with mock.patch.object(communicator_class(), "__init__", fails):
        yield


def constructor_fails(ranks: list[int], kind: str) -> tuple[Outcome, int, bool]:
    """A constructor that fails on some ranks; how many were made and closed; whether it works once it does not fail."""
    from aiter import _exchange

    creation.CLOSING = 0.3
    with mock.patch.object(_exchange, "PATIENCE", 1.0):
        with constructor(kind) if dist.get_rank() in ranks else ExitStack():
            found = outcome()
        fusion_aiter.release()
    return found, len(recorded("close")), runs_fused(ADD)


def growth_fails(rank: int) -> tuple[list[bool], list[str], int]:
    """Whether calls are fused: small, too large for what one rank has memory for, small again; states; how many stay."""
    creation.CLOSING = 0.3
    with constructor("after", above=2 << 20) if dist.get_rank() == rank else ExitStack():
        found = [runs_fused(ADD, tokens, 8192, max_tokens=100) for tokens in (4, 5)]
        found += [runs_fused(ADD, tokens, 8192, max_tokens=most) for tokens, most in ((150, 200), (151, 200), (6, 200))]
    return found, states(), int(held().handle.communicator._ptr != 0)


@contextmanager
def wrong(kinds: list[str], names: list[str], ranks: list[int]) -> Iterator[None]:
    """Kernels whose sum is 6 % off on some ranks."""
    from aiter import _kernels

    plain = _kernels.fused

    def off(launch: Any, kernel: str, given: Any, *others: Any, **flags: Any) -> Any:
        if launch.kind in kinds and kernel in names:
            given = [each * 1.06 for each in given]
        return plain(launch, kernel, given, *others, **flags)

    with mock.patch.object(_kernels, "fused", off) if dist.get_rank() in ranks else ExitStack():
        yield


def wrong_kernel(name: str, kind: str, ranks: list[int], others: list[str]) -> tuple[Outcome, list[bool]]:
    """A kernel that is wrong on this machine; whether others are fused."""
    with wrong([kind], ["1-stage", "2-stage", "split"], ranks):
        found = outcome(name)
        assert len(kernels()) == 3, "the self-check's alone"
        return found, [runs_fused(each) for each in others]


def wrong_when_large(name: str, kind: str) -> tuple[list[bool], list[int], list[tuple[str, str]]]:
    """A kernel for more than 512 KiB that is wrong: which calls are fused, the rows of the checks, the reasons."""
    with wrong([kind], ["split"], [0, 1]):
        found = [runs_fused(name, tokens, 1024) for tokens in (4, 256)]
        record().clear()
        found += [runs_fused(name, 300, 1024)]
        checked = [each["kwargs"]["inp"]["shape"][0] for each in kernels()]
        found += [runs_fused(name, tokens, 1024) for tokens in (301, 255)]
    return found, checked, reasons(name)


@contextmanager
def gives_nothing(method: str) -> Iterator[None]:
    """A method that returns None, as AITER's do where they do not apply."""
    with mock.patch.object(communicator_class(), method, return_value=None):
        yield


def nothing_given(late: bool) -> list[tuple[float, list[tuple[str, str]], bool]]:
    """Kernels that give nothing from the start, or after they passed their check; whether a kernel is fused then."""
    found = []
    for name in ("all_reduce", ADD, NORM, TOKEN_FP8, "all_reduce_rms_norm_group_fp8", "all_reduce_add_rms_norm_mxfp4"):
        if late:
            assert run(name) <= 1
        with gives_nothing(BY_NAME[name].method):
            distance = max(run(name), run(name, 7))
        found.append((distance, reasons(name), runs_fused(name)))
    return found


def call_of(kernel: Kernel, x: torch.Tensor) -> Call:
    """A call of a kernel in the default group, as far as it decides on the communicator."""
    group, form = dist.group.WORLD.group_name, kernel.staged[False, False]
    return Call(kernel.definition, f"aiter.{kernel.name}", {"x": x}, group, kernel=form)


def late(rank: int) -> tuple[str, float]:
    """One rank that never comes to its first call: the state of the others, and how long they waited."""
    AITER.arrival = AITER.step = 1.0
    dist.barrier()  # so that the time limit counts from one moment
    if dist.get_rank() == rank:
        dist.barrier()
        return "late", 0.0
    start = time.monotonic()
    x = torch.ones(4, 512, dtype=torch.bfloat16)
    assert COMMUNICATORS.ready(call_of(BY_NAME["all_reduce"], x)) is None
    took = time.monotonic() - start
    dist.barrier()
    return states()[0], took


def disagreeing() -> str:
    """Ranks whose first calls are of different sizes: the real kernels would wait for ever."""
    x = torch.ones(4 + dist.get_rank(), 512, dtype=torch.bfloat16)
    assert COMMUNICATORS.ready(call_of(BY_NAME["all_reduce"], x)) is None
    assert sizes_made() == []
    return states()[0]
