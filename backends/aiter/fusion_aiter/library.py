"""AITER itself, imported when a communicator is first made, and never before."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def module() -> Any:
    """``aiter.dist.device_communicators.custom_all_reduce`` with its kernels built and loaded.

    The first import in a fresh installation compiles them with hipcc for some minutes, under AITER's own file lock.

    Raises:
        Exception: any that importing or building raises: RuntimeError without ROCm, AssertionError without hipcc,
            KeyError on an unknown GPU.
    """
    import aiter.dist.device_communicators.custom_all_reduce as found

    return found


def communicators_made() -> int | None:
    """The number of communicators that this process has made, by AITER's own count; None if AITER has no count.

    AITER exchanges handles under this number: ranks with different ones would wait for each other forever.
    """
    number = getattr(getattr(module(), "IPCBufferPool", None), "_pool_seq", None)
    return number if isinstance(number, int) else None
