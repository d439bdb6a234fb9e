"""Times calls on all ranks of the default process group at once."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from fusion_core.tune.clock import Clock
from fusion_core.tune.ranks import Ranks

WARM = 3
"""Untimed calls before a block of timed ones: they synchronise the ranks and warm clocks and caches."""
MOST_STEPS, FEWEST_STEPS = 1000, 3


class StepTimer:
    """Times calls by the clock of their device."""

    def __init__(self, on_gpu: bool) -> None:
        self.clock = Clock(on_gpu)

    def barrier(self) -> None:
        """Wait until every rank is here and its device is idle."""
        self.clock.synchronize()
        largest(0.0)  # a barrier over gloo: torch's own would use the GPU's group and put a kernel into the stream

    def times(self, call: Callable[[], object], count: int) -> list[float]:
        """Microseconds of each of ``count`` calls, after a barrier and a few untimed calls."""
        self.barrier()
        for _ in range(WARM):
            call()
        marks = [self.clock.mark()]
        for _ in range(count):
            call()
            marks.append(self.clock.mark())
        self.clock.synchronize()
        return [self.clock.us(begin, end) for begin, end in itertools.pairwise(marks)]


def largest(value: float) -> float:
    """The largest of all ranks' values; infinite if one of them is NaN."""
    return max(math.inf if math.isnan(each) else each for each in _ranks(dist.group.WORLD).gather(value))


@functools.lru_cache(maxsize=1)
def _ranks(group: Any) -> Ranks:
    """The ranks of the default group, which communicate without their GPUs."""
    return Ranks(group)


def steps_of(us: float, seconds: float) -> int:
    """The number of calls of ``us`` microseconds that fill ``seconds``, within bounds."""
    return min(MOST_STEPS, max(FEWEST_STEPS, math.ceil(seconds * 1e6 / max(us, 1e-3))))


def rounds(
    timer: StepTimer, sides: Mapping[str, Callable[[], object]], count: int, seconds: float
) -> tuple[dict[str, tuple[float, ...]], int]:
    """Time the sides alternately: A B, B A, A B, … so that neither always runs on the warmer chip.

    Args:
        timer: What times the calls.
        sides: Name → the function to call.
        count: The number of rounds.
        seconds: How long a side's calls should take in a round; all sides make the same number of calls.

    Returns:
        Name → microseconds of a call in each round: the median of its calls, on the slowest rank. And the number of
        calls in a round.
    """
    first = {name: largest(statistics.median(timer.times(call, FEWEST_STEPS))) for name, call in sides.items()}
    steps = steps_of(max(first.values()), seconds)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(count):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(largest(statistics.median(timer.times(sides[name], steps))))
    return {name: tuple(figures) for name, figures in found.items()}, steps
