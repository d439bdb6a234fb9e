"""The clock of a device: events in the current stream of a GPU, wall-clock time on the CPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Marks points in the work of this process's device, and measures the time between two of them.

    Args:
        on_gpu: Whether the device is the current CUDA device; else it is the CPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def mark(self) -> Any:
        """A mark: an event in the GPU's current stream, or the wall-clock time on the CPU."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait for all work of the device; call it before `us`."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def us(self, begin: Any, end: Any) -> float:
        """Microseconds from one mark to another."""
        return float(begin.elapsed_time(end) * 1e3 if self.on_gpu else (end - begin) * 1e6)
