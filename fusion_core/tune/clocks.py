"""How a run of sites is timed: inside a CUDA graph between two events, or on the CPU by the clock on the wall."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fusion_core.tune.ranks import Ranks, said

Run = Callable[[], object]

MIB = 1 << 20
BEHIND_L2 = 256 * MIB
"""Of the memory that caches for all dies of an AMD MI300X or MI355X behind their L2; torch does not report it."""
AHEAD = 600_000
"""GPU cycles for which a replay is held back, so that the CPU's launches are not timed."""


class Clock(Protocol):
    """What measures runs on one kind of device. Collective: all ranks make the same calls in the same order."""

    def sites(self, size: int) -> int:
        """How many sites a run should have whose x has ``size`` bytes."""
        ...

    def flush(self) -> None:
        """Push out of the device's caches what a model has pushed out by the time it comes to its next site."""
        ...

    def record(self, run: Run) -> Run:
        """The run in the form that is timed; it has been called once before."""
        ...

    def times(self, runs: Mapping[str, Run], size: int) -> tuple[dict[str, float], dict[str, str]]:
        """Median microseconds of each recorded run on this rank, and why a run has none; the runs take turns.

        A run that raises on some ranks is left out on all, in step: the others' times are not lost with it.
        """
        ...

    def settle(self) -> None:
        """Wait for what was started, so that its errors are raised here."""
        ...

    def shortage(self, size: int) -> str | None:
        """That less than ``size`` bytes of memory are left on this rank, as a phrase."""
        ...

    def drop(self) -> None:
        """Forget everything recorded, and the memory that it holds."""
        ...


class _Failures:
    """Runs that raised while they were timed. A run is left out from the next `exchange` on, on all ranks at once."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._mine: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.why

    def caught(self, name: str, run: Run) -> bool:
        """Call a run that has not raised here yet; whether it did not."""
        if name in self._mine:
            return False
        try:
            run()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a path raises: the others must hear of it
            self._mine[name] = said(error)
            return False
        return True

    def exchange(self) -> None:
        """Hear from all ranks what failed there."""
        self.why = self._ranks.failed(self._mine)


class GraphClock:
    """Times CUDA graphs. Before each replay the ranks meet in an all_reduce, outside of what is timed."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._token = torch.zeros(1, device=device)
        self._stream = torch.cuda.Stream(device)
        cached = torch.cuda.get_device_properties(device).L2_cache_size
        cached = max(cached, BEHIND_L2) if torch.version.hip else cached
        self._others = torch.zeros(2, cached * 5 // 8, dtype=torch.uint8, device=device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._pool: Any = None

    def sites(self, size: int) -> int:
        """16, with which the ends of a run weigh little; fewer where one takes long by itself."""
        return max(4, min(16, 480 * MIB // size))

    def flush(self) -> None:
        """Copy a little more than the GPU caches, by one node of a graph: what a site needs comes from memory then.

        Without it a chain of sites has everything at hand, and a path of two kernels looks better in it than it is in a
        model (benchmarks/README.md, "A cold site"). A reduction would bring a memset into the graph, which starts
        sooner in one graph than in another.
        """
        self._others[0].copy_(self._others[1])

    def record(self, run: Run) -> Run:
        """A graph's replay. The graphs of a point share their memory: nothing of one is needed after another."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # not by torch.cuda.graph: giving all free memory back before each capture takes longer than the capture
        with torch.cuda.stream(self._stream):
            # thread_local: NCCL's watchdog, another thread, asks CUDA for its events meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                self._pool = None  # who knows what a capture that broke off leaves there
                with contextlib.suppress(RuntimeError):  # it says that the capture broke off
                    graph.capture_end()
                raise
            graph.capture_end()
        self._graphs.append(graph)
        return graph.replay

    def times(self, runs: Mapping[str, Run], size: int) -> tuple[dict[str, float], dict[str, str]]:
        """Between two events in the stream."""
        failures = _Failures(self._ranks)
        marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        # the less there is to time, the more it is lost in how far apart the ranks are
        warm, replays = 2, 45 if size <= MIB else 15 if size <= 4 * MIB else 7
        self._ranks.meet()
        for turn in range(warm + replays):
            for name, run in runs.items():
                if name in failures:
                    continue
                torch.cuda._sleep(AHEAD)
                dist.all_reduce(self._token, group=self._ranks.group)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                ran = failures.caught(name, run)
                end.record()
                if ran and turn >= warm:
                    marks[name].append((begin, end))
            torch.cuda.synchronize(self._device)
            if turn < warm or turn == warm + replays - 1:  # not in between: the ranks' words would part the replays
                failures.exchange()
        found = {
            name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) * 1e3
            for name, pairs in marks.items()
            if name not in failures
        }
        return found, failures.why

    def settle(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self._device)

    def shortage(self, size: int) -> str | None:
        """What torch holds and does not use counts as free."""
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + held
        return None if free >= size else f"{free / MIB:.0f} MiB of GPU memory are free"

    def drop(self) -> None:
        """Before the process group goes: destroying it waits for ever for graphs that hold NCCL's work."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = None


class WallClock:
    """Times calls as they are, for devices without CUDA graphs. Before each the ranks meet in a barrier."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def sites(self, size: int) -> int:
        """Few: a collective on the CPU is long beside the clock."""
        return 5 if size <= MIB else 1

    def flush(self) -> None:
        """Nothing: the processes of one CPU share its caches, and a collective takes longer than what they save."""

    def record(self, run: Run) -> Run:
        """The run itself."""
        return run

    def times(self, runs: Mapping[str, Run], size: int) -> tuple[dict[str, float], dict[str, str]]:
        """By the clock."""
        failures = _Failures(self._ranks)
        found: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(1 + 5):
            for name, run in runs.items():
                if name in failures:
                    continue
                self._ranks.meet()
                begin = time.perf_counter()
                if failures.caught(name, run) and turn:
                    found[name].append((time.perf_counter() - begin) * 1e6)
            failures.exchange()
        return {name: statistics.median(times) for name, times in found.items() if name not in failures}, failures.why

    def settle(self) -> None:
        """Nothing runs on."""

    def shortage(self, size: int) -> str | None:
        """Nobody knows: the system gives memory when it is used."""
        return None

    def drop(self) -> None:
        """Nothing is held."""


def clock_for(ranks: Ranks, device: torch.device) -> Clock:
    """The clock of a device."""
    return GraphClock(ranks, device) if device.type == "cuda" else WallClock(ranks)
