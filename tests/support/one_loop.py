"""One event loop for all gloo groups of a worker.

gloo starts a thread for each process group, which polls for traffic a hundred times a second until the process ends. A
worker whose tests make a hundred groups would keep a core busy with that. What the groups send is the same.
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
    """A gloo group whose traffic goes through the existing loop of this process."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, **newer: Any) -> None:
        """From 2.14 on torch also says whether a group may change its ranks later; no test asks for that."""
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._threads, options._timeout = [_device()], 2, timeout
        super().__init__(store, rank, size, options)


def use() -> None:
    """Make every gloo group that is created from now on use one loop."""
    distributed_c10d.ProcessGroupGloo = OneLoop  # type: ignore[misc]
