"""Captures as CUDA sees them, over a stand-in for torch.cuda: there need be no GPU."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fusion_core.tune import timers
from fusion_core.tune.timers import GraphTimer

DEVICE = torch.device("cpu")


@pytest.fixture
def said(monkeypatch):
    """What torch.cuda was told, in order."""
    found = []

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            found.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            found.append("end")
            if "broken" in found:
                raise RuntimeError("the capture broke off")

        def replay(self):
            found.append("replay")

        def reset(self):
            found.append("reset")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            found.append("event")

        def elapsed_time(self, other):
            return 0.25  # milliseconds

    pools = iter(range(100))
    stand_in = SimpleNamespace(
        CUDAGraph=Graph,
        Event=Event,
        Stream=lambda device: "side",
        stream=lambda stream: contextlib.nullcontext(),
        graph_pool_handle=lambda: next(pools),
        synchronize=lambda device: found.append("synchronize"),
        memory_reserved=lambda device: 5 << 20,
        memory_allocated=lambda device: 2 << 20,
        mem_get_info=lambda device: (4 << 20, 100 << 20),
        _sleep=lambda cycles: found.append("sleep"),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=4 << 20),
    )
    monkeypatch.setattr(timers.torch, "cuda", stand_in)
    monkeypatch.setattr(timers.dist, "all_reduce", lambda token, group: found.append("barrier"))
    return found


@pytest.fixture
def timer(said):
    return GraphTimer(SimpleNamespace(group=None, barrier=lambda: None, failed=dict), DEVICE)


def test_graphs_of_a_point_share_a_pool_and_are_dropped_together(timer, said):
    for _ in range(2):
        timer.record(lambda: said.append("run"))()
    one = ["synchronize", ("begin", 0, "thread_local"), "run", "end", "replay"]
    assert said == one * 2
    said.clear()
    timer.drop()
    timer.drop()
    assert said == ["reset", "reset"]
    timer.record(lambda: None)
    assert ("begin", 1, "thread_local") in said


def test_a_capture_that_breaks_off_is_ended_and_says_why(timer, said):
    def run():
        said.append("broken")
        raise ValueError("not in a capture")

    with pytest.raises(ValueError, match="not in a capture"):
        timer.record(run)
    assert said[-2:] == ["broken", "end"]
    said.clear()
    timer.record(lambda: None)
    assert ("begin", 1, "thread_local") in said  # not into what is left of the first
    timer.drop()
    assert said.count("reset") == 1


@pytest.mark.parametrize(("hip", "cached"), [(None, 4 << 20), ("7.2", 256 << 20)])
def test_a_flush_copies_more_than_the_caches_hold(said, monkeypatch, hip, cached):
    monkeypatch.setattr(timers.torch.version, "hip", hip)
    timer = GraphTimer(SimpleNamespace(group=None, barrier=lambda: None, failed=dict), DEVICE)
    copies = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, of: copies.append((to, of)))
    timer.flush()
    ((to, of),) = copies
    assert to.data_ptr() != of.data_ptr()
    moved = to.nbytes + of.nbytes
    assert cached < moved < 1.5 * cached


def test_runs_take_turns_and_ranks_meet_before_what_is_timed(timer, said):
    runs = {name: lambda name=name: said.append(name) for name in ("a", "b")}
    assert timer.times(runs, 1 << 20) == ({"a": 250.0, "b": 250.0}, {})
    turn = [word for name in ("a", "b") for word in ("sleep", "barrier", "event", name, "event")]
    assert said == [*turn, "synchronize"] * (2 + 45)
    said.clear()
    timer.times(runs, 64 << 20)
    assert said.count("a") == 2 + 7


def test_memory_that_torch_holds_and_does_not_use_is_free(timer):
    assert timer.shortage(7 << 20) is None
    assert timer.shortage((7 << 20) + 1) == "7 MiB of GPU memory are free"
