"""Kernels run where all ranks of a group are about to run the same graph, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fusion_core.workers import WorkerPool
from tests import kernel_calls_jobs as jobs

pytestmark = pytest.mark.timeout(120)  # a hang is what must not be

EXACT = 1e-4


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with WorkerPool(2, timeout=60.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("whole", "dynamic"),
    [
        pytest.param(False, False, id="the post-grad graph-fixed sizes"),
        pytest.param(False, True, id="the post-grad graph-dynamic sizes", marks=pytest.mark.nightly),
        pytest.param(True, False, id="the whole of Inductor-fixed sizes", marks=pytest.mark.nightly),
        pytest.param(True, True, id="the whole of Inductor-dynamic sizes"),
    ],
)
def test_kernels_run_where_all_ranks_run_one_graph(two: WorkerPool, whole: bool, dynamic: bool) -> None:
    for found in two.run(jobs.alike, whole, dynamic):
        assert max(found.errors) < EXACT
        assert set(found.ran) == {2}
        assert (found.warned, found.run_time) == ([], [])


COMES = "did not take part in the first kernel of a graph"
DIFFERENCES = {
    "a graph break": "runs a graph of 1 collective with acme.gathered at all_reduce, needs the same graph on every rank",
    "dynamic sizes": "needs the same graph on every rank",
    "a requirement": COMES,
    "a trace that fails": COMES,
    "an order": "",
    "suppressed errors": COMES,
}


@pytest.mark.parametrize("how", DIFFERENCES)
def test_where_one_rank_runs_another_graph_all_run_unfused_and_say_why(two: WorkerPool, how: str) -> None:
    here, there = two.run(jobs.differing, how)
    for found in (here, there):
        assert max(found.errors) < EXACT
        assert set(found.ran) == {0}
    why = DIFFERENCES[how]
    assert [why in text for text in here.run_time] == ([True] if why else [])
    assert [why in text for text in here.warned] == ([True] if why else [])
    if how == "a graph break":
        assert here.run_time == there.run_time
    assert here.seconds[1] < 1.0  # asked once


def test_ranks_that_agreed_before_go_unfused_together_when_they_take_other_graphs(two: WorkerPool) -> None:
    for found in two.run(jobs.both_take_other_graphs, True):
        assert max(found.errors) < EXACT
        assert found.ran == [2, 0, 0]
        assert len(found.warned) == len(found.run_time) == 1


def test_a_second_graph_that_all_take_is_agreed_on_as_well(two: WorkerPool) -> None:
    for found in two.run(jobs.both_take_other_graphs, False):
        assert max(found.errors) < EXACT
        assert (found.ran, found.warned) == ([2, 2, 2], [])


def test_a_rank_that_waits_for_one_inside_a_kernel_raises_in_time(two: WorkerPool) -> None:
    here, there = two.run(jobs.one_takes_another_graph)
    assert here.ran == [2, 2]
    assert there.raised.startswith("a graph of 1 collective with acme.gathered at all_reduce: rank 0 did not take part")
    assert "may be inside a kernel that was agreed on before" in there.raised


@pytest.mark.parametrize("times", [1, 3])
def test_an_interrupted_rank_that_tries_again_ends_like_the_others(two: WorkerPool, times: int) -> None:
    for found in two.run(jobs.interrupted, times):
        assert max(found.errors) < EXACT
        assert (found.ran[-1], found.warned) == (2, [])


@pytest.mark.parametrize("differ", [False, True], ids=["alike", "another strategy on one rank"])
def test_the_eager_functions_agree_as_well(two: WorkerPool, differ: bool) -> None:
    here, there = two.run(jobs.by_hand, differ)
    for found in (here, there):
        assert max(found.errors) < EXACT
        assert found.ran == ([0, 0] if differ else [1, 1])
    assert [COMES in text for text in here.warned] == ([True] if differ else [])
    assert there.warned == []


@pytest.mark.parametrize("break_on_one", [False, True], ids=["one graph", "a graph break on one rank"])
def test_all_reduces_side_by_side_pair_whatever_graph_they_are_in(two: WorkerPool, break_on_one: bool) -> None:
    here, there = two.run(jobs.side_by_side, break_on_one)
    assert max(here.errors + there.errors) < EXACT
    assert [pattern for pattern, _ in here.sites] == ["all_reduce", "all_reduce_add_rms_norm", "all_reduce"]


def test_a_configuration_that_one_rank_takes_later_raises_there(two: WorkerPool) -> None:
    here, there = two.run(jobs.one_is_configured_anew)
    assert (here.raised, here.ran) == ("", [2])
    assert "rank 0" in there.raised
    assert "may be inside a kernel that was agreed on before" in there.raised
