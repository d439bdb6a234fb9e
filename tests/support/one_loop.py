"""One event loop for all gloo groups of a worker.

gloo starts a thread for each process group, which looks for traffic a hundred times a second for as long as the process
lives: a worker whose tests make a hundred groups otherwise spends a core on nothing. What the groups send is the same.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d


@functools.cache
def _device() -> Any:
    return ProcessGroupGloo.create_default_device()


class OneLoop(ProcessGroupGloo):
    """A gloo group whose traffic goes through the loop that this process has already."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._threads, options._timeout = [_device()], 2, timeout
        super().__init__(store, rank, size, options)


def use() -> None:
    """Have every gloo group that is made from now on use one loop."""
    distributed_c10d.ProcessGroupGloo = OneLoop  # type: ignore[misc]
