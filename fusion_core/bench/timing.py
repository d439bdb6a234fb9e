"""Timing calls on all ranks of the default process group, side by side."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from fusion_core.tune.ranks import Ranks

WARM = 3
"""Calls before the timed ones of a block: the ranks drift together, clocks and caches are warm."""
MOST_STEPS, FEWEST_STEPS = 1000, 3


class Clock:
    """Times calls on a GPU, by events on its stream, or on the CPU."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def meet(self) -> None:
        """Wait until every rank is here and has nothing left to do."""
        self.synchronise()
        largest(0.0)  # a barrier; torch's own would take the GPU's group, and its kernel would stand in the stream

    def synchronise(self) -> None:
        """Wait for this rank's GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Microseconds of each of ``count`` calls, after a few; ranks meet before them, outside the timing."""
        self.meet()
        for _ in range(WARM):
            call()
        if self.on_gpu:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            events[0].record()
            for event in events[1:]:
                call()
                event.record()
            torch.cuda.synchronize()
            return [a.elapsed_time(b) * 1000 for a, b in itertools.pairwise(events)]
        clock = [time.perf_counter()]
        for _ in range(count):
            call()
            clock.append(time.perf_counter())
        return [(b - a) * 1e6 for a, b in itertools.pairwise(clock)]


def largest(value: float) -> float:
    """The largest of all ranks' values; infinite where one of them is no number."""
    return max(math.inf if math.isnan(each) else each for each in _ranks(dist.group.WORLD).gather(value))


@functools.lru_cache(maxsize=1)
def _ranks(group: Any) -> Ranks:
    """The ranks of the default group, who talk beside the GPUs."""
    return Ranks(group)


def steps_of(us: float, seconds: float) -> int:
    """How many calls of ``us`` microseconds fill ``seconds``, within bounds."""
    return min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(seconds * 1e6 / max(us, 1e-3))))


def rounds(
    clock: Clock, sides: Mapping[str, Callable[[], object]], count: int, seconds: float
) -> tuple[dict[str, tuple[float, ...]], int]:
    """Time sides by turns: A B, B A, A B, … so that neither always runs on the warmer chip.

    Args:
        clock: What to time by.
        sides: What to call.
        count: How many rounds.
        seconds: What the calls of a side are to take in a round; the number of them is the same for all.

    Returns:
        Microseconds of a call, a figure for each round: the median of its calls, on the slowest rank. And the calls of
        a round.
    """
    first = {name: largest(statistics.median(clock.times(call, FEWEST_STEPS))) for name, call in sides.items()}
    steps = steps_of(max(first.values()), seconds)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(count):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(largest(statistics.median(clock.times(sides[name], steps))))
    return {name: tuple(figures) for name, figures in found.items()}, steps
