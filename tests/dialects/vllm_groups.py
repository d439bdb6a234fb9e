"""vLLM's registry of process groups, as much of it as its operators and the dialect use."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch.distributed as dist

HANDLE = 3
"""Of the memory that the ranks of a group share on a CPU."""
PARALLEL_STATE = "vllm.distributed.parallel_state"


class Coordinator:
    """As much of vLLM's ``GroupCoordinator`` as its operators and the dialect use."""

    def __init__(self, device_group: dist.ProcessGroup) -> None:
        self.device_group = device_group
        self.device_communicator = SimpleNamespace(dist_module=SimpleNamespace(handle=HANDLE))


@contextmanager
def vllm_groups(**names: dist.ProcessGroup) -> Iterator[dict[str, Coordinator]]:
    """vLLM's registry of process groups, with torch's groups under vLLM's names (``tp_0`` for ``"tp:0"``)."""
    coordinators = {name.replace("_", ":"): Coordinator(group) for name, group in names.items()}
    module = ModuleType(PARALLEL_STATE)
    module._groups = {name: weakref.ref(each) for name, each in coordinators.items()}  # type: ignore[attr-defined]
    before = sys.modules.get(PARALLEL_STATE)
    sys.modules[PARALLEL_STATE] = module
    try:
        yield coordinators
    finally:
        del sys.modules[PARALLEL_STATE]
        if before is not None:
            sys.modules[PARALLEL_STATE] = before
