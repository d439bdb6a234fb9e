"""The environment variables that torchrun sets for a process, checked before they are used."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fusion_core.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """This process's place among the processes of one torchrun job.

    Attributes:
        rank: Its rank.
        world_size: The number of processes.
        local_rank: Its rank on this host.
        local_world_size: The number of processes on this host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launch() -> Launch | None:
    """Read the environment; None if torchrun did not start this process.

    Raises:
        ConfigError: if a variable is missing or has an impossible value.
    """
    there = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not there:
        return None
    if len(there) == 1:
        needs = "RANK and WORLD_SIZE as torchrun sets them, or neither"
        raise ConfigError(f"the environment has {there[0]} alone, needs {needs}")
    world_size = _number("WORLD_SIZE", 1)
    rank = _number("RANK", 0, world_size)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"{' and '.join(missing)} {verb} not set, needs an address; torchrun sets it")
    _number("MASTER_PORT", 0, 2**16)
    local_world_size = _number("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else 1
    local_rank = _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else 0
    return Launch(rank, world_size, local_rank, local_world_size)


def _number(name: str, least: int, end: int | None = None) -> int:
    """A variable as a whole number, at least ``least`` and below ``end``."""
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and int(text[:20]) >= least and (end is None or int(text[:20]) < end)):
        needs = f"a whole number from {least} on" if end is None else f"a whole number from {least} to {end - 1}"
        raise ConfigError(f"{name} is {text!r}, needs {needs}; torchrun sets it")
    return int(text)
