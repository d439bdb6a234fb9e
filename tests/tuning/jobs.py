"""What the workers of test_measure.py run."""

from contextlib import contextmanager, nullcontext
from importlib.metadata import EntryPoint

import pytest
import torch
import torch.distributed as dist

from fusion_core import AllReduce, ConfigError, FusionConfig
from fusion_core.plugins.registry import GROUP, Registry
from fusion_core.tune import engines
from fusion_core.tune.measure import Bench
from fusion_core.tune.plan import Plan
from fusion_core.tune.ranks import Ranks
from fusion_core.tune.timers import CallTimer
from tests.tuning import acme

DTYPE = torch.float32


def registry(order=("acme",), **fields):
    points = [EntryPoint("acme", "tests.tuning.acme", GROUP), EntryPoint("reference", "fusion_reference", GROUP)]
    return Registry.of(points, FusionConfig(order=order, **fields))


class Timer(CallTimer):
    """Says what it is asked."""

    def __init__(self, ranks, short=None):
        super().__init__(ranks)
        self.short = short
        self.asked, self.recorded, self.dropped, self.flushed = [], 0, 0, 0

    def shortage(self, size):
        self.asked.append(size)
        return self.short

    def flush(self):
        self.flushed += 1

    def record(self, run):
        run()
        self.recorded += 1
        return run

    def drop(self):
        self.dropped += 1


def _plan(order=("acme",), dtype=DTYPE):
    ranks = Ranks()
    return ranks, Plan(registry(order), dtype, torch.device("cpu"), ranks.name, ranks.size)


def measured(pattern, hidden, tokens, without=(), order=("acme",), dtype=DTYPE):
    """A point's figures and notes."""
    acme._calls.clear()
    acme._timed.clear()
    acme._exits.clear()
    acme._fallen.clear()
    ranks, plan = _plan(order, dtype)
    timer = Timer(ranks)
    found = Bench(plan, ranks, timer, tokens).measure(plan.registry.patterns[pattern], hidden, tokens, without)
    return found.us, found.notes, timer.recorded, timer.dropped


engine_log = []


def summed(x):
    return acme.right(x, group=dist.group.WORLD.group_name)


@contextmanager
def acme_engine():
    engine_log.append("set up")
    yield AllReduce("acme::all_reduce", summed)
    engine_log.append("gone")


def broken_engine():
    raise RuntimeError("no driver")


def odd_engine():
    return nullcontext(5)


@contextmanager
def waiting_engine():
    dist.barrier()
    yield AllReduce("acme::all_reduce", summed)


def engine_of_rank_0():
    """The error where rank 1 cannot import an engine whose set-up is collective."""
    module = "tests.tuning.jobs:waiting_engine" if dist.get_rank() == 0 else "engine:all_reduce"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "entry_points", lambda group: [EntryPoint("acme", module, group)])
        try:
            with engines.all_reduce_of("acme", Ranks()):
                return "set up"
        except ConfigError as error:
            return str(error)


def measured_with_engines():
    """A point with the all_reduces of two engines, one of them wrong, and how often the right one was captured."""
    captured = []

    @contextmanager
    def capture():
        captured.append(1)
        yield

    acme._calls.clear()
    ranks = Ranks()
    own = AllReduce("acme::all_reduce", summed, capture)
    collectives = {own.operator: own, "wrong::all_reduce": AllReduce("wrong::all_reduce", torch.clone)}
    plan = Plan(registry(), DTYPE, torch.device("cpu"), ranks.name, ranks.size, collectives)
    found = Bench(plan, ranks, Timer(ranks), 8).measure(plan.registry.patterns["all_reduce"], 64, 8)
    return found.us, found.notes, len(captured)


def flushed():
    """How often the caches were flushed in the runs of a point as they were recorded, and how many sites those have."""
    ranks, plan = _plan()
    timer = Timer(ranks)
    timer.times = lambda runs, size: (dict.fromkeys(runs, 1.0), {})
    Bench(plan, ranks, timer, 4).measure(plan.registry.patterns["all_reduce"], 64, 4)
    return timer.flushed, timer.recorded * timer.sites(64 * 4 * 4)


def measured_where_a_run_fails(name):
    """A point of which this run, on rank 1, does not run to the end while it is timed."""
    ranks, plan = _plan()
    timer = Timer(ranks)
    whole = timer.times

    def raises():
        raise RuntimeError("the device is lost")

    timer.times = lambda runs, size: whole({**runs, name: raises if ranks.rank == 1 else runs[name]}, size)
    without = [f"acme.{each.__name__}" for each in (acme.raises_in_a_later_repetition, acme.exits_when_timed)]
    found = Bench(plan, ranks, timer, 4).measure(plan.registry.patterns["all_reduce"], 64, 4, without)
    return found.us, found.notes


def measured_where_memory_is_short():
    ranks, plan = _plan()
    timer = Timer(ranks, "3 MiB are free" if dist.get_rank() == 1 else None)
    found = Bench(plan, ranks, timer, 4).measure(plan.registry.patterns["all_reduce"], 64, 4)
    return found.us, found.notes, timer.asked, timer.recorded


def ranks_talk():
    ranks = Ranks()

    def fails():
        if ranks.rank == 1:
            raise ValueError("x" * 1000 + "\nsecond line")
        return 1.0

    times = {"a": float(ranks.rank), "b": -float(ranks.rank)}
    given = ranks.attempt(lambda: float(ranks.rank + 5))
    return ranks.gather(ranks.rank), ranks.broadcast(ranks.rank), given, ranks.attempt(fails), ranks.slowest(times)
