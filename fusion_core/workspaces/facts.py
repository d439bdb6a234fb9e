"""The facts that ranks compare before they make shared memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusion_core._cuda import host_id
from fusion_core.agree.agreement import disagreement
from fusion_core.reason import Reason
from fusion_core.workspaces.call import Call

CALL = "call"
SAME = "the same graphs, settings, libraries and GPUs on all ranks"


def facts_of(call: Call) -> dict[str, Any]:
    """The facts that every backend's ranks compare: the call, the host, and this rank's GPU (None on a CPU)."""
    device = call.x.device
    gpu = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        gpu = _uuid(device.index)
    return {CALL: str(call), "host": host_id(), "gpu": gpu}


def difference(ranks: Sequence[Mapping[str, Any]], may_differ: Sequence[str] = ()) -> Reason | None:
    """The reason why the ranks cannot share memory, or None.

    Args:
        ranks: The facts of each rank, including those of `facts_of`.
        may_differ: Names of facts that need not be equal.
    """
    names = [CALL, *(name for rank in ranks for name in rank)]
    same = [name for name in dict.fromkeys(names) if name not in (*may_differ, "host", "gpu")]
    filled = [dict.fromkeys(names) | dict(rank) for rank in ranks]
    return disagreement(filled, same, SAME)


def unreachable(ranks: Sequence[Mapping[str, Any]], device: torch.device) -> Reason | None:
    """The reason why this rank's GPU cannot access another rank's memory, or None. Kernels require this access.

    A GPU that this process cannot see is not checked, e.g. where each process sees only its own.
    """
    if device.type != "cuda":
        return None
    visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
    for number, rank in enumerate(ranks):
        other = visible.get(rank["gpu"], device.index)
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            found = f"GPU {device.index} cannot access the memory of GPU {other}, that of rank {number}"
            return Reason("links", found, "linked GPUs")
    return None


def _uuid(index: int) -> str:
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", index))


def too_little_memory(device: torch.device, size: int, margin: int = 0) -> Reason | None:
    """The reason why a workspace does not fit into the GPU's free memory; None if it fits, and on a CPU.

    Args:
        device: The GPU. If needed, unused memory of torch's allocator is given back first.
        size: Bytes that the workspace takes.
        margin: Bytes that must stay free.
    """
    if device.type != "cuda":
        return None
    if torch.cuda.mem_get_info(device)[0] < size + margin:
        torch.cuda.empty_cache()
    if (free := torch.cuda.mem_get_info(device)[0]) >= size + margin:
        return None
    return Reason(
        "memory",
        f"{free >> 20} MiB of GPU memory are free, and the workspace takes {size >> 20} MiB",
        "more free memory",
        hint="leave the model's allocator less, or set FusionConfig(max_tokens=...)",
    )
