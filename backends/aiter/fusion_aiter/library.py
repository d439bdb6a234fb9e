"""AITER itself, imported when a communicator is first made, and never before."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def module() -> Any:
    """``aiter.dist.device_communicators.custom_all_reduce`` with its kernels built and loaded.

    The first import in a fresh installation compiles them by hipcc for some minutes, behind AITER's own file lock.

    Raises:
        Exception: whatever importing or building raises: RuntimeError without ROCm, AssertionError without hipcc,
            KeyError on a GPU that it does not know.
    """
    import aiter.dist.device_communicators.custom_all_reduce as found

    return found


def communicators_made() -> int | None:
    """How many communicators this process has made, by AITER's own count; None where it keeps none.

    Handles are exchanged under this number: ranks with different ones would wait for each other for ever.
    """
    number = getattr(getattr(module(), "IPCBufferPool", None), "_pool_seq", None)
    return number if isinstance(number, int) else None
