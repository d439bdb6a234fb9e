"""vLLM's names for process groups.

vLLM's collectives take a name of its own (``"tp:0"``), a key of a registry of weak references to its coordinators, each
of which holds torch's group. Source: ``vllm/distributed/parallel_state.py``, ``_groups`` and ``GroupCoordinator``. vLLM
is never imported for it: where a graph has its operators, it is loaded.
"""

from __future__ import annotations

import sys

from fusion_core.reason import Reason

_MODULE = "vllm.distributed.parallel_state"


def torch_group(name: object) -> str | Reason:
    """The name by which torch knows the group that vLLM calls ``name``."""
    known = torch_groups()
    if isinstance(name, str) and name in known:
        return known[name]
    needs = f"one of {', '.join(known)}" if known else f"a group in {_MODULE}, which has none"
    return Reason("group", f"the process group is vLLM's {name!r}, which this process does not know", needs, "group")


def torch_groups() -> dict[str, str]:
    """VLLM's name for each of its groups that are alive → torch's."""
    groups = getattr(sys.modules.get(_MODULE), "_groups", {})
    coordinators = {str(name): reference() for name, reference in groups.items()}
    found = {name: getattr(coordinator, "device_group", None) for name, coordinator in coordinators.items()}
    return {name: str(group.group_name) for name, group in sorted(found.items()) if group is not None}
