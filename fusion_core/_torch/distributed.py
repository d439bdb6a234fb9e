"""Process groups by name, all groups of a process, and their stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

if dist.is_available():
    from torch._C._distributed_c10d import PrefixStore, TCPStore

__all__ = [
    "PrefixStore",
    "TCPStore",
    "functional_all_reduce",
    "group_by_name",
    "groups",
    "nvlinks",
    "own_rank",
    "size_of",
    "store_of",
]


def group_by_name(name: str) -> dist.ProcessGroup:
    """The process group of a name.

    Raises:
        AttributeError, LookupError, RuntimeError, ValueError: torch's own, if there is none.
    """
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def size_of(name: str) -> int:
    """The number of ranks of the group of a name; a constant in a compiled graph."""
    return int(group_by_name(name).size())


def own_rank(name: str) -> int:
    """This process's rank in the group of a name; a constant in a compiled graph."""
    return int(group_by_name(name).rank())


for _constant in (size_of, own_rank):  # as `torch.compiler.assume_constant_result` does, which imports Dynamo
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def groups() -> list[dist.ProcessGroup]:
    """Every process group that this process is in; none if torch.distributed is not initialised."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    return list(dist.distributed_c10d._world.pg_map)


def store_of(group: dist.ProcessGroup) -> Any:
    """The store of a group; None if it was made without one.

    Raises:
        KeyError: if the group is destroyed.
    """
    return dist.distributed_c10d._get_process_group_store(group)


def functional_all_reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of every rank's ``x``, as models compute it with functional collectives."""
    from torch.distributed import _functional_collectives  # its import is slow

    summed: torch.Tensor = _functional_collectives.all_reduce(x, "sum", group)
    return summed


def nvlinks() -> Sequence[Sequence[int]] | None:
    """The number of NVLinks between each pair of visible GPUs; None if torch cannot detect it."""
    # missing from torch's stubs: a change of it must not stop a model
    try:
        devices = torch._C._autograd.DeviceType
        found = torch._C._distributed_c10d._detect_dma_connectivity(devices.CUDA, "nvlink")  # type: ignore[attr-defined]
        matrix: Sequence[Sequence[int]] = found.matrix
    except (AttributeError, RuntimeError, TypeError):
        return None
    return matrix
