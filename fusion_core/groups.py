"""Process groups by name, as graphs refer to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from fusion_core._torch.distributed import group_by_name, groups
from fusion_core.errors import ConfigError


def resolved(name: str) -> dist.ProcessGroup | None:
    """The group of a name; None if this process is in no such group."""
    try:
        return group_by_name(name)
    except (AttributeError, RuntimeError, ValueError, LookupError):
        return None


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of a name, as graphs pass it to an operator.

    Args:
        name: The group's ``ProcessGroup.group_name``.

    Returns:
        The group: the same object at each call until it is destroyed.

    Raises:
        ConfigError: if this process is in no group of that name, because it was never made or is destroyed.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> process_group(dist.group.WORLD.group_name).size()
        1
        >>> dist.destroy_process_group()
    """
    found = resolved(name)
    if found is None:
        known = ", ".join(repr(str(group.group_name)) for group in groups())
        known = known or "there is none, init_process_group makes one"
        raise ConfigError(f"group is {name!r}, needs the name of a process group of this process: {known}")
    return found


@dataclass(frozen=True)
class AllReduce:
    """The all_reduce of a serving engine, over all ranks of the default group.

    Attributes:
        operator: The operator by which compiled graphs call it: ``"vllm::all_reduce"``.
        run: From a rank's tensor to the sum over the ranks, in the same shape and dtype. It may overwrite its argument.
        capture: The context in which a CUDA graph that calls it is captured.
    """

    operator: str
    run: Callable[[Tensor], Tensor]
    capture: Callable[[], AbstractContextManager[object]] = nullcontext


# by the group, not its name, which a later group may have
_all_reduces: WeakKeyDictionary[dist.ProcessGroup, Callable[[Tensor], Tensor]] = WeakKeyDictionary()


def use_all_reduce(group: str, all_reduce: Callable[[Tensor], Tensor] | None) -> None:
    """Set the all_reduce of sites whose kernel does not run: a framework's own may be faster than torch's.

    Every rank of the group has to set the same one. It is forgotten with the group.

    Args:
        group: The group's name.
        all_reduce: From a rank's tensor to the sum over the ranks, in the same shape and dtype. It may overwrite its
            argument, and has to run in a CUDA graph's capture where sites do. None for torch's.

    Raises:
        ConfigError: if this process is in no group of that name.
    """
    found = process_group(group)
    if all_reduce is None:
        _all_reduces.pop(found, None)
    else:
        _all_reduces[found] = all_reduce


def all_reduce_of(group: str) -> Callable[[Tensor], Tensor] | None:
    """What `use_all_reduce` set for a group; None for torch's."""
    found = resolved(group) if _all_reduces else None
    return None if found is None else _all_reduces.get(found)


def world_size(group: str) -> int | None:
    """The number of ranks of a group; None if this process is in no such group."""
    found = resolved(group)
    return None if found is None else int(found.size())


def group_name(group: dist.ProcessGroup | str | None) -> str:
    """The name of a process group; None is the default group.

    Raises:
        ConfigError: if torch.distributed is not initialised, or has no group of that name.
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
    """Whether a group has other ranks that exist: those of torch's ``fake`` groups do not."""
    if group.size() < 2:
        return False
    try:
        return "fake" not in dist.get_backend_config(group)
    except (RuntimeError, ValueError, KeyError):
        return True  # destroyed: the next collective in it raises


def global_ranks(group: dist.ProcessGroup) -> list[int]:
    """The global ranks of a group's members."""
    try:
        return list(dist.get_process_group_ranks(group))
    except (KeyError, RuntimeError, ValueError):
        return list(range(group.size()))
