"""Facts about process groups, by the names that graphs use."""

from __future__ import annotations

import torch.distributed as dist

from fusion_core.errors import ConfigError


def world_size(group: str) -> int | None:
    """The number of ranks of a group; None where this process knows no such group."""
    try:
        return int(dist.distributed_c10d._resolve_process_group(group).size())  # type: ignore[arg-type,attr-defined]
    except (AttributeError, RuntimeError, ValueError, LookupError):
        return None


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
