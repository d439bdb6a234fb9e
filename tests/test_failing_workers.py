"""A worker that raises, leaves, crashes, is killed or hangs: the pool says which, and why."""

import os
import signal
import time

import pytest

from fusion_core.errors import FusionError
from fusion_core.workers import WorkerError, WorkerPool
from tests.worker_jobs import (
    breaks_in_the_parent,
    child_and_death,
    crashed,
    hang_in_python,
    is_alive,
    killed,
    killed_alone,
    leave,
    not_picklable,
    pids,
    raise_on,
    rank_and_sum,
    skip_the_collective,
    stop,
)


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def single():
    with WorkerPool(1) as pool:
        yield pool


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_reported_at_once(pool, rank):
    old = pids(pool)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="bad luck") as caught:
        pool.run(raise_on, rank, timeout=100)
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert isinstance(caught.value, FusionError)
    assert caught.value.rank == rank
    assert text.startswith(f"rank {rank} of 2 failed in tests.worker_jobs.raise_on: it raised\nTraceback")
    assert f"ValueError: bad luck on {rank}" in text
    assert f"rank {1 - rank} was stopped at" in text, text  # it waited in all_reduce
    assert "in all_reduce" in text
    assert not any(map(is_alive, old))
    assert [rank for rank, _, _ in pool.run(rank_and_sum, 1)] == [0, 1]  # with new workers
    assert not set(old) & set(pids(pool))


def test_a_call_of_which_a_rank_is_to_fail_has_the_results_of_the_others(pool):
    died, came = pool.run_each(killed_alone, 0, timeout=60)
    assert str(died).startswith("rank 0 of 2 failed in tests.worker_jobs.killed_alone: it was killed by SIGKILL")
    assert died.rank == 0
    assert came == "here"
    came, late = pool.run_each(hang_in_python, 1, timeout=3)
    assert came == "here"
    assert "did not finish tests.worker_jobs.hang_in_python within 3 s: it was stopped at" in str(late)
    assert "wait_without_end" in str(late)
    assert pool.run_each(rank_and_sum, 1)[1][0] == 1


def test_leaving_is_a_failure_too(pool):
    with pytest.raises(WorkerError, match="SystemExit: 3") as caught:
        pool.run(leave, 1, 3)
    assert caught.value.rank == 1


def test_a_rank_that_is_killed_comes_before_the_ranks_that_it_takes_along(pool):
    with pytest.raises(WorkerError) as caught:
        pool.run(killed, 1, timeout=100)
    assert caught.value.rank == 1
    assert str(caught.value).startswith("rank 1 of 2 failed in tests.worker_jobs.killed: it was killed by SIGKILL")


def test_a_rank_that_crashes_leaves_its_stack(single):
    with pytest.raises(WorkerError, match="killed by SIGSEGV") as caught:
        single.run(crashed)
    assert "in crashed" in str(caught.value)


def test_a_worker_that_dies_between_two_calls_is_reported(single):
    os.kill(pids(single)[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"rank 0 of 1 failed in .*rank_and_sum: it was killed by SIGKILL"):
        single.run(rank_and_sum, 1)


def test_a_death_is_seen_though_a_child_holds_the_connection_open(single):
    single.run(rank_and_sum, 1)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        single.run(child_and_death, timeout=100)
    assert time.monotonic() - start < 20


def test_a_rank_that_hangs_is_named_with_its_stack(pool):
    old = pids(pool)
    with pytest.raises(WorkerError) as caught:
        pool.run(hang_in_python, 1, timeout=1.0)
    text = str(caught.value)
    assert caught.value.rank == 1
    assert text.startswith("rank 1 of 2 did not finish tests.worker_jobs.hang_in_python within 1 s")
    assert "in wait_without_end" in text
    assert "rank 0" not in text
    assert not any(map(is_alive, old))


def test_ranks_that_wait_for_a_collective_are_named_with_their_stack(pool):
    with pytest.raises(WorkerError, match="rank 0 of 2 did not finish") as caught:
        pool.run(skip_the_collective, 1, timeout=1.0)
    assert "in skip_the_collective" in str(caught.value)


def test_a_process_that_does_not_react_is_killed(pool):
    old = pids(pool)
    with pytest.raises(WorkerError, match=r"rank 1 of 2 did not finish(.|\n)*it did not react"):
        pool.run(stop, 1, timeout=1.0)
    assert not any(map(is_alive, old))


def test_a_result_that_cannot_be_pickled_is_an_error(single):
    with pytest.raises(
        WorkerError, match=r"of 1 failed in .*not_picklable: it gave a result that cannot be pickled\nTraceback"
    ):
        single.run(not_picklable)


def test_a_result_that_cannot_be_unpickled_is_an_error(single):
    with pytest.raises(WorkerError, match=r"cannot be unpickled(.|\n)*not here"):
        single.run(breaks_in_the_parent)


def test_what_cannot_be_sent_is_an_error_and_stops_nothing(single):
    old = pids(single)
    with pytest.raises(WorkerError, match="cannot be sent"):
        single.run(lambda: None)
    function = type(pids)(pids.__code__, {}, "of_main")
    function.__module__, function.__qualname__ = "__main__", "of_main"
    with pytest.raises(WorkerError, match=r"__main__\.of_main is defined in __main__, needs a module"):
        single.run(function)
    assert pids(single) == old
