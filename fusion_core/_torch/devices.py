"""Devices and streams: functions that torch has no public version of, or only a slower one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def current_stream_id(index: int) -> int:
    """The handle of a device's current stream, by the device's index. It is read at every call of a kernel."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def spin(cycles: int) -> None:
    """Keep the current stream busy for this many cycles of the GPU's clock."""
    torch.cuda._sleep(cycles)


def only_cpu() -> AbstractContextManager[Any]:
    """Within a block, make `torch.accelerator` report the CPU, whatever accelerator torch was built for."""
    from unittest import mock  # it imports asyncio

    return mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu"))
