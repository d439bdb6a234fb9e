"""Worker pools that live as long as this process, and the world sizes that they can have."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import hypothesis
import torch

from fusion_core.plugins.requirements import WorldSize
from fusion_core.site import Site
from fusion_core.testing.subject import Subject
from fusion_core.workers import WorkerPool

T = TypeVar("T")

PRELOAD = ("fusion_core.testing.compiled", "fusion_core.testing.faulty", "torch._inductor.compile_fx")
"""What the kit's workers import. It starts some fifteen for a strategy, each of which would spend 6 s of CPU on it."""
TIMEOUT = 300.0
"""Seconds that one call may take: the first one may build kernels."""
USUAL = (2, 1, 3)
"""World sizes to test, the usual one first."""
THOROUGH = 1000
"""With at least this many examples, the largest world size that a strategy accepts is tested too."""


@functools.cache
def pool(world_size: int, device_type: str) -> WorkerPool:
    """The pool of ``world_size`` processes, with the collectives for a type of device."""
    return new_pool(world_size, device_type, TIMEOUT)


def new_pool(world_size: int, device_type: str, timeout: float) -> WorkerPool:
    """A pool whose processes nobody else uses."""
    backend = "nccl" if device_type == "cuda" else "gloo"
    return WorkerPool(world_size, backend=backend, timeout=timeout, preload=PRELOAD)


def run(site: Site, function: Callable[..., T], subject: Subject, *args: Any) -> list[T]:
    """Call a job on every rank of a site.

    Raises:
        WorkerError: if a rank raises, dies or does not answer in time; new workers start with the next call.
    """
    return pool(site.world_size, site.device.type).run(function, subject, site, *args)


def most_ranks(device_type: str) -> int:
    """The largest world size that this machine can run."""
    return torch.cuda.device_count() if device_type == "cuda" else 8


def world_sizes(subject: Subject, device_type: str) -> tuple[int, ...]:
    """The world sizes at which a strategy is tested here, the usual one first; empty if there is none."""
    allowed = [r.sizes for r in subject.requirements if isinstance(r, WorldSize)]
    most = most_ranks(device_type)

    def fit(sizes: Iterable[int]) -> tuple[int, ...]:
        return tuple(size for size in sizes if size <= most and all(size in each for each in allowed))

    every = fit(sorted({size for each in allowed for size in each}))
    found = fit(USUAL) or every[:1]
    if len(found) == 1:  # kernels for 2, 4 and 8 ranks are separate code
        found += every[1:2]
    if every and hypothesis.settings().max_examples >= THOROUGH:
        found += every[-1:]
    return tuple(dict.fromkeys(found))


def every_world_size(subject: Subject, device_type: str) -> tuple[int, ...]:
    """The world sizes that a strategy accepts and this machine can run, ascending; CPUs run at least 4 ranks."""
    allowed = [r.sizes for r in subject.requirements if isinstance(r, WorldSize)]
    most = most_ranks(device_type) if device_type == "cuda" else min(max(4, os.cpu_count() or 4), most_ranks("cpu"))
    taken = [size for size in range(1, most + 1) if all(size in each for each in allowed)]
    return tuple(taken if allowed else taken[:4]) or world_sizes(subject, device_type)


def close() -> None:
    """Stop all workers; a later call starts new ones."""
    for world_size in range(1, most_ranks("cpu") + 1):
        for device_type in ("cpu", "cuda"):
            pool(world_size, device_type).close()
    pool.cache_clear()
