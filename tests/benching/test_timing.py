import math

import pytest
import torch

from fusion_core.bench import timing
from fusion_core.bench.timing import FEWEST_STEPS, MOST_STEPS, WARM, StepTimer, largest, rounds, steps_of

pytestmark = pytest.mark.usefixtures("one_rank")


class Recorded(StepTimer):
    """Takes its times from a list, and keeps the order of what it was asked for."""

    def __init__(self, **times):
        super().__init__(on_gpu=False)
        self.all, self.asked = times, []

    def times(self, call, count):
        self.asked.append((call(), count))
        return self.all[call()].pop(0)


def test_sides_take_turns_and_a_figure_is_the_median_of_a_round():
    timer = Recorded(a=[[9.0], [1.0, 2.0, 9.0], [3.0], [4.0]], b=[[20.0], [5.0], [6.0], [7.0]])
    found, steps = rounds(timer, {"a": lambda: "a", "b": lambda: "b"}, 3, seconds=0.001)
    assert found == {"a": (2.0, 3.0, 4.0), "b": (5.0, 6.0, 7.0)}
    assert "".join(name for name, _ in timer.asked[2:]) == "abbaab"
    assert steps == 50  # of the slower side's 20 µs in a millisecond
    assert {count for _, count in timer.asked[2:]} == {50}


def test_the_slowest_rank_counts(monkeypatch):
    monkeypatch.setattr(timing, "largest", lambda value: value + 100)
    timer = Recorded(a=[[1.0], [2.0]])
    found, _ = rounds(timer, {"a": lambda: "a"}, 1, seconds=0.001)
    assert found == {"a": (102.0,)}


def test_ranks_meet_before_the_calls_and_the_first_are_not_timed(monkeypatch):
    said = []
    timer = StepTimer(on_gpu=False)
    monkeypatch.setattr(timer, "barrier", lambda: said.append("meet"))
    found = timer.times(lambda: said.append("call"), 5)
    assert said == ["meet"] + ["call"] * (WARM + 5)
    assert len(found) == 5
    assert all(time > 0 for time in found)


def test_on_a_gpu_the_time_lies_between_events(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")
            self.at = len(said)

        def elapsed_time(self, other):
            return other.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    found = StepTimer(on_gpu=True).times(lambda: said.append("call"), 2)
    assert said == ["wait", "call", "call", "call", "event", "call", "event", "call", "event", "wait"]
    assert found == [2000.0, 2000.0]


@pytest.mark.parametrize(
    ("us", "seconds", "steps"),
    [(100.0, 0.1, 1000), (1000.0, 0.1, 100), (1e9, 0.1, FEWEST_STEPS), (0.0, 0.1, MOST_STEPS), (300.0, 0.001, 4)],
)
def test_steps_fill_a_round_within_bounds(us, seconds, steps):
    assert steps_of(us, seconds) == steps


def test_what_is_no_number_is_infinite_on_all_ranks():
    assert largest(2.5) == 2.5
    assert largest(math.nan) == math.inf
