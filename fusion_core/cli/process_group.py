"""A process group for a model that a command runs: torchrun's, or without torchrun one of this process alone."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fusion_core.cli.launch import launch
from fusion_core.config import FusionConfig
from fusion_core.errors import ConfigError
from fusion_core.plugins.registry import Registry


class OnEveryRank(ConfigError):
    """An error that all ranks raise at the same point, so that none of them waits in a collective."""


@contextmanager
def process_group() -> Iterator[int]:
    """Provide a default process group for a block; yields this process's rank.

    Raises:
        ConfigError: if the environment has an impossible value, or the group cannot be initialised.
    """
    if dist.is_initialized():
        yield dist.get_rank()
        return
    launched = launch()
    if launched is not None:
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(launched.local_rank)
            dist.init_process_group()
        except (ValueError, RuntimeError) as error:
            why = str(error).partition("\n")[0]  # torch appends a C++ stack trace
            raise ConfigError(f"no process group by the environment: {why}; start it with torchrun") from error
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    failed = True
    try:
        yield dist.get_rank()
        failed = False
    except OnEveryRank:
        failed = False
        raise
    finally:
        if dist.is_initialized() and not (failed and launched):  # after an error other ranks may hang in a collective
            # A compiled model keeps its group alive, so destroying it does not stop gloo's threads. A thread that still
            # frees the last collective's tensors while the interpreter exits calls std::terminate.
            dist.barrier()
            dist.destroy_process_group()


def check_same(**facts: Any) -> None:
    """Raise on every rank if any rank's value of a fact differs from rank 0's. Collective, over the default group.

    Raises:
        OnEveryRank: with the rank, the fact and both values.
    """
    values: list[Mapping[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(values, facts)
    for rank, other in enumerate(values):
        for name, value in values[0].items():
            if other[name] != value:
                raise OnEveryRank(f"rank {rank} has {name} {other[name]!r}, needs {value!r} as rank 0 has it")


def choices(config: FusionConfig, registry: Registry) -> dict[str, Any]:
    """The facts that must be the same on all ranks for them to make the same choices, for `check_same`."""
    backends = [
        f"{backend.name} ({backend.distribution}, {len(backend.declared)} strategies)"
        for backend in registry.backends.values()
    ]
    return {"order": config.order, "options": config.options, "backends": ", ".join(backends)}


def command() -> str:
    """The torchrun command that started this process, for the record of a measurement, with what sets NCCL and us."""
    prefixes = ("NCCL_", "FUSION_CORE_")
    settings = sorted(
        f"{name}={shlex.quote(value)} " for name, value in os.environ.items() if name.startswith(prefixes)
    )
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = f"--nnodes {world // local} " if world > local else ""
    return f"{''.join(settings)}torchrun {nodes}--nproc-per-node {local} -m fusion_core {shlex.join(sys.argv[1:])}"
