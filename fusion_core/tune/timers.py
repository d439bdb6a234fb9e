"""Timers for a run of sites: of a CUDA graph on a GPU, of plain calls on the CPU."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fusion_core._torch.devices import spin
from fusion_core.tune.clock import Clock
from fusion_core.tune.ranks import Ranks, message_of

Run = Callable[[], object]

MIB = 1 << 20
BEHIND_L2 = 256 * MIB
"""Bytes of the last-level cache behind the L2 of an AMD MI300X or MI355X, which torch does not report."""
AHEAD = 600_000
"""GPU cycles by which a replay is delayed, so that the CPU's launches are not timed."""


class Timer(Protocol):
    """Measures runs on one kind of device. Collective: all ranks make the same calls in the same order."""

    def sites(self, size: int) -> int:
        """The number of sites in a run, for an x of ``size`` bytes."""
        ...

    def flush(self) -> None:
        """Evict from the device's caches what a model would have evicted before its next site."""
        ...

    def record(self, run: Run) -> Run:
        """The run in the form that is timed. It has been called once before."""
        ...

    def times(self, runs: Mapping[str, Run], size: int) -> tuple[dict[str, float], dict[str, str]]:
        """Median microseconds of each recorded run on this rank, and the error of each run without a time.

        The runs alternate. A run that raises on some ranks is dropped on all of them at the same point, so that the
        times of the others are not lost.
        """
        ...

    def settle(self) -> None:
        """Wait for all work, so that its errors are raised here."""
        ...

    def shortage(self, size: int) -> str | None:
        """How much memory is free on this rank, as a phrase; None if it is at least ``size`` bytes."""
        ...

    def drop(self) -> None:
        """Drop all recorded runs and free their memory."""
        ...


class _Failures:
    """Runs that raised while they were timed. From the next `exchange` on, all ranks skip such a run."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._mine: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.why

    def caught(self, name: str, run: Run) -> bool:
        """Call a run unless it has raised on this rank before; returns whether it ran without an error."""
        if name in self._mine:
            return False
        try:
            run()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a path raises, the other ranks must know
            self._mine[name] = message_of(error)
            return False
        return True

    def exchange(self) -> None:
        """Collect the failures of all ranks."""
        self.why = self._ranks.failed(self._mine)


class GraphTimer:
    """Times CUDA graphs. Before each replay, outside the timing, an all_reduce synchronises the ranks."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._clock = Clock(on_gpu=True)
        self._token = torch.zeros(1, device=device)
        self._stream = torch.cuda.Stream(device)
        cached = torch.cuda.get_device_properties(device).L2_cache_size
        cached = max(cached, BEHIND_L2) if torch.version.hip else cached
        self._others = torch.zeros(2, cached * 5 // 8, dtype=torch.uint8, device=device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None

    def sites(self, size: int) -> int:
        """16, so that the start and the end of a run weigh little; fewer for large sites."""
        return max(4, min(16, 480 * MIB // size))

    def flush(self) -> None:
        """Copy a little more than the GPU can cache, with one graph node, so that a site reads from memory.

        Otherwise a chain of sites finds all of its data in the cache, which makes a path of two kernels look better
        than it is in a model (benchmarks/README.md, "A cold site"). A reduction would add a memset to the graph, which
        starts earlier in some graphs than in others.
        """
        self._others[0].copy_(self._others[1])

    def record(self, run: Run) -> Run:
        """The replay of a CUDA graph. The graphs of a point share one memory pool: none reads another's results."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # not torch.cuda.graph, which frees all cached memory before each capture; that takes longer than the capture
        with torch.cuda.stream(self._stream):
            # thread_local, because NCCL's watchdog thread queries CUDA events during the capture
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                self._pool = None  # an aborted capture may leave the pool in any state
                with contextlib.suppress(RuntimeError):  # it raises because the capture was aborted
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs.append(graph)
        return graph.replay

    def times(self, runs: Mapping[str, Run], size: int) -> tuple[dict[str, float], dict[str, str]]:
        """Times between two events in the stream."""
        failures = _Failures(self._ranks)
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
        # the shorter a run, the more the skew between ranks disturbs its time
        warm, replays = 2, 45 if size <= MIB else 15 if size <= 4 * MIB else 7
        self._ranks.barrier()
        for turn in range(warm + replays):
            for name, run in runs.items():
                if name in failures:
                    continue
                spin(AHEAD)
                dist.all_reduce(self._token, group=self._ranks.group)
                begin = self._clock.mark()
                ran = failures.caught(name, run)
                end = self._clock.mark()
                if ran and turn >= warm:
                    marks[name].append((begin, end))
            torch.cuda.synchronize(self._device)
            if turn < warm or turn == warm + replays - 1:  # not in between: messages would add skew between replays
                failures.exchange()
        found = {
            name: statistics.median(self._clock.us(begin, end) for begin, end in pairs)
            for name, pairs in marks.items()
            if name not in failures
        }
        return found, failures.why

    def settle(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self._device)

    def shortage(self, size: int) -> str | None:
        """Memory that torch has reserved but not allocated counts as free."""
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + held
        return None if free >= size else f"{free / MIB:.0f} MiB of GPU memory are free"

    def drop(self) -> None:
        """Call it before the process group is destroyed: that waits forever for graphs that hold NCCL's work."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None


class CallTimer:
    """Times plain calls, for devices without CUDA graphs. A barrier synchronises the ranks before each."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._clock = Clock(on_gpu=False)

    def sites(self, size: int) -> int:
        """Few: a collective on the CPU takes long compared with the clock's resolution."""
        return 5 if size <= MIB else 1

    def flush(self) -> None:
        """Does nothing: the processes of one CPU share its caches, which save less time than a collective takes."""

    def record(self, run: Run) -> Run:
        """The run itself."""
        return run

    def times(self, runs: Mapping[str, Run], size: int) -> tuple[dict[str, float], dict[str, str]]:
        """Times of the wall clock."""
        failures = _Failures(self._ranks)
        found: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(1 + 5):
            for name, run in runs.items():
                if name in failures:
                    continue
                self._ranks.barrier()
                begin = self._clock.mark()
                if failures.caught(name, run) and turn:
                    found[name].append(self._clock.us(begin, self._clock.mark()))
            failures.exchange()
        return {name: statistics.median(times) for name, times in found.items() if name not in failures}, failures.why

    def settle(self) -> None:
        """Does nothing: calls on the CPU are synchronous."""

    def shortage(self, size: int) -> str | None:
        """None: the system allocates memory only when it is used, so the free amount is unknown."""
        return None

    def drop(self) -> None:
        """Does nothing: no memory is held."""


def timer_for(ranks: Ranks, device: torch.device) -> Timer:
    """The timer of a device."""
    return GraphTimer(ranks, device) if device.type == "cuda" else CallTimer(ranks)
