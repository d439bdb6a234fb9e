"""Facts about process groups, by the names that graphs use."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from fusion_core.errors import ConfigError

_resolve: Callable[[str], dist.ProcessGroup] | None = getattr(
    getattr(dist, "distributed_c10d", None), "_resolve_process_group", None
)


def resolved(name: str) -> dist.ProcessGroup | None:
    """The group of a name; None where this process knows no such group."""
    try:
        return None if _resolve is None else _resolve(name)
    except (AttributeError, RuntimeError, ValueError, LookupError):
        return None


def world_size(group: str) -> int | None:
    """The number of ranks of a group; None where this process knows no such group."""
    found = resolved(group)
    return None if found is None else int(found.size())


def group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name of a process group; None is the default group.

    Raises:
        ConfigError: where torch.distributed is not initialised, or knows no group of that name.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError(
            "torch.distributed is not initialised, needs init_process_group before a collective is called"
        )
    if group is None:
        group = dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        return str(group.group_name)
    if not isinstance(group, str) or world_size(group) is None:
        raise ConfigError(f"group is {group!r}, needs a ProcessGroup, the name of one, or None for the default group")
    return group


def is_shared(group: dist.ProcessGroup) -> bool:
    """Whether a group has other ranks that really exist: torch's ``fake`` groups only look as if."""
    if group.size() < 2:
        return False
    try:
        return "fake" not in dist.get_backend_config(group)
    except (RuntimeError, ValueError, KeyError):
        return True  # destroyed; whoever needs its ranks will hear of it


def global_ranks(group: dist.ProcessGroup) -> list[int]:
    """The ranks of a group as the whole job numbers them."""
    try:
        return list(dist.get_process_group_ranks(group))
    except (KeyError, RuntimeError, ValueError):
        return list(range(group.size()))
