"""A process group for a model that a command runs: torchrun's where it started us, else one of this process alone."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fusion_core.errors import ConfigError


@contextmanager
def process_group() -> Iterator[int]:
    """Have a default process group while the block runs; gives this process's rank.

    Raises:
        ConfigError: where the environment has one of RANK and WORLD_SIZE without the other, or no group comes up.
    """
    if dist.is_initialized():
        yield dist.get_rank()
        return
    names = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(names) == 1:
        raise ConfigError(
            f"the environment has {names[0]} alone, needs RANK and WORLD_SIZE as torchrun sets them, or neither"
        )
    if names:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            dist.init_process_group()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"no process group by the environment: {error}; start it with torchrun") from error
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    failed = True
    try:
        yield dist.get_rank()
        failed = False
    finally:
        if dist.is_initialized() and not (failed and names):  # after an error other ranks may hang in a collective
            # A compiled model keeps its group, so destroying it ends none of gloo's threads; one that still drops the
            # last collective's tensors calls std::terminate when the interpreter is ending.
            dist.barrier()
            dist.destroy_process_group()


def command() -> str:
    """The command that started this process under torchrun, for records of what was measured."""
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = f"--nnodes {world // local} " if world > local else ""
    return f"torchrun {nodes}--nproc-per-node {local} -m fusion_core {shlex.join(sys.argv[1:])}"
