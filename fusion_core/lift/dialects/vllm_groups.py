"""vLLM's names for process groups.

vLLM's collectives take vLLM's own name of a group (``"tp:0"``), the key of a registry of weak references to its
coordinators, each of which has torch's group. Source: ``vllm/distributed/parallel_state.py``, ``_groups`` and
``GroupCoordinator``. vLLM is not imported here: if a graph has its operators, it is already loaded.
"""

from __future__ import annotations

import sys
from typing import Any

from fusion_core.reason import Reason

_MODULE = "vllm.distributed.parallel_state"


def torch_group(name: object) -> str | Reason:
    """Torch's name of the group that vLLM calls ``name``, or a reason."""
    known = torch_groups()
    if isinstance(name, str) and name in known:
        return known[name]
    needs = f"one of {', '.join(known)}" if known else f"a group in {_MODULE}, which has none"
    return Reason("group", f"the process group is vLLM's {name!r}, which this process does not know", needs, "group")


def shared_memory_group(handle: object) -> str | Reason:
    """Torch's name of the group whose ranks reduce over the shared memory of a handle, or a reason.

    Source: ``vllm/distributed/device_communicators/cpu_communicator.py``, ``_CPUSHMDistributed``.
    """
    for coordinator in _coordinators().values():
        communicator = getattr(coordinator, "device_communicator", None)
        own = getattr(getattr(communicator, "dist_module", None), "handle", None)
        if own is not None and own == handle:
            return str(coordinator.device_group.group_name)
    return Reason("group", f"no group of vLLM's has the shared memory {handle!r}", "a group of this process", "group")


def torch_groups() -> dict[str, str]:
    """VLLM's name of each of its live groups → torch's name."""
    return {name: str(group.group_name) for name, group in _groups().items()}


def shared_groups() -> dict[str, str]:
    """`torch_groups` of several ranks: a group of one has another name on each rank, and no graph reduces in it."""
    return {name: str(group.group_name) for name, group in _groups().items() if group.size() > 1}


def _groups() -> dict[str, Any]:
    found = {name: getattr(coordinator, "device_group", None) for name, coordinator in _coordinators().items()}
    return {name: group for name, group in sorted(found.items()) if group is not None}


def _coordinators() -> dict[str, Any]:
    groups = getattr(sys.modules.get(_MODULE), "_groups", {})
    return {str(name): reference() for name, reference in groups.items()}
