"""Figures of a point, by two real processes: what fails on one rank is left out on both."""

import pytest
import torch

from fusion_core.tune.timers import GraphTimer
from fusion_core.workers import WorkerPool
from tests.tuning import jobs
from tests.tuning.acme import ADD


@pytest.fixture(scope="module")
def ranks():
    with WorkerPool(2, timeout=240) as pool:
        yield pool


@pytest.fixture(scope="module")
def bare(ranks):
    """The bare all_reduce by every strategy, on both ranks."""
    return ranks.run(jobs.measured, "all_reduce", 64, 8)


def test_the_ranks_hear_of_each_other(ranks):
    for gathered, first, given, failed, slowest in ranks.run(jobs.ranks_talk):
        assert gathered == [0, 1]
        assert first == 0
        assert given == (6.0, None)
        assert failed == (0.0, ("rank 1: ValueError: " + "x" * 1000)[: len("rank 1: ") + 400])
        assert slowest == {"a": 1.0, "b": 0.0}


def test_all_ranks_come_to_the_same_figures(bare):
    (us, notes, _, dropped), other = bare
    assert (us, notes) == other[:2]
    assert us.keys() == {"unfused", "acme.right"}
    assert all(1.0 < time < 1e6 for time in us.values())
    assert dropped == other[3] == 1


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("raises_on_rank_1", "rank 1: RuntimeError: no memory is left"),
        ("raises_when_timed", "rank 0: RuntimeError: not in a capture"),
        ("raises_in_a_later_repetition", "rank 1: RuntimeError: the third repetition"),
        ("exits_when_timed", "rank 0: SystemExit: enough"),
        ("sums_nothing", "its results differ from the unfused path's by "),
        ("not_a_number_on_rank_1", "its results differ from the unfused path's by inf of their magnitude"),
        ("falls_back", "rank 1: RuntimeError: it runs unfused: no memory is left, needs 64 MiB"),
        ("falls_back_when_timed", "rank 1: RuntimeError: it runs unfused: it is gone, needs 64 MiB"),
        ("only_on_rank_0", "rank 1: this is another rank, needs rank 0"),
    ],
)
def test_what_is_wrong_on_one_rank_is_left_out_on_all(bare, path, says):
    for _, notes, *_ in bare:
        assert notes[f"acme.{path}"].startswith(says)


def test_what_nobody_switched_on_is_not_mentioned(bare):
    for us, notes, *_ in bare:
        assert "acme.switched_off" not in {**us, **notes}


def test_every_site_is_cold(ranks):
    for flushes, sites in ranks.run(jobs.flushed):
        assert flushes == sites > 0


def test_what_is_dropped_is_not_run(ranks):
    without = ["acme.sums_nothing", "acme.raises_on_rank_1"]
    for _, notes, *_ in ranks.run(jobs.measured, "all_reduce", 64, 8, without):
        assert not {*without} & notes.keys()


def test_where_the_producer_alone_fails_while_it_is_timed_the_point_has_no_figures(ranks):
    for us, notes in ranks.run(jobs.measured_where_a_run_fails, "producer"):
        assert us == {}
        assert notes["unfused"] == "rank 1: RuntimeError: the device is lost"


def test_where_memory_is_short_on_one_rank_nothing_is_begun(ranks):
    for us, notes, asked, recorded in ranks.run(jobs.measured_where_memory_is_short):
        assert us == {}
        assert notes == {"unfused": "rank 1: 3 MiB are free, needs 0 MiB"}
        assert asked == [16 * 64 * 4 * 4]
        assert recorded == 0


def test_a_size_that_the_definition_does_not_take(ranks):
    for us, notes, *_ in ranks.run(jobs.measured, "all_reduce_rms_norm_group_fp8", 100, 4):
        assert us == {}
        assert "unfused" in notes


@pytest.mark.nightly  # `test_the_whole_way` of the command line measures whole patterns too
def test_a_whole_pattern_and_a_bare_all_reduce_with_the_rest_behind_it(ranks):
    (us, notes, *_), (other, *_) = ranks.run(jobs.measured, ADD, 64, 8, (), ("acme", "reference"), torch.bfloat16)
    assert us == other
    assert us.keys() >= {"unfused", "acme.right", "acme.with_norm", "reference.all_reduce_in_rank_order"}
    assert f"reference.{ADD}" not in {**us, **notes}  # the unfused path by another name
    assert "acme.sums_nothing" in notes


def test_a_graph_has_fewer_sites_where_one_takes_long():
    timer = object.__new__(GraphTimer)
    assert [timer.sites(size << 20) for size in (1, 16, 32, 64, 256, 1024)] == [16, 16, 15, 7, 4, 4]
