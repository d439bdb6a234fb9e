"""Torch's real kernels over symmetric memory. ``make test-gpu`` runs this on as many GPUs as there are, 2 or 4."""

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.gpu import symmetric_memory_jobs as jobs

TOKENS = [1, 2, 3, 5, 17, 128, 1000, 4096]
HIDDEN = [64, 2880, 4096, 8192]

pytestmark = [pytest.mark.cuda(devices=2), pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks():
    # a kernel that waits for a lost rank spins for ever: the pool's time limit ends the processes
    with WorkerPool(4 if torch.cuda.device_count() >= 4 else 2, backend="nccl", timeout=120) as pool:
        yield pool


def test_every_kernel_at_every_size(ranks):
    for calls, off in ranks.run(jobs.grid, TOKENS, HIDDEN):
        assert off == []
        assert calls == 2 * 2 * len(TOKENS) * len(HIDDEN)


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 8192), (33, 4096), (1000, 2880)])
def test_a_graph_replayed_two_hundred_times(ranks, tokens, hidden):
    assert ranks.run(jobs.replays, 200, tokens, hidden) == [(0, [])] * ranks.world_size


def test_exact_sums_on_ranks_out_of_step(ranks):
    assert ranks.run(jobs.exact_sums, 700, [(1, 64), (3, 4096), (64, 8192)]) == [0] * ranks.world_size


def test_a_graph_outlives_the_growth_of_its_buffer(ranks):
    for same, small, both in ranks.run(jobs.growth_under_a_graph):
        assert same
        assert both > 2 * small


def test_a_first_call_in_a_capture(ranks):
    for error, reasons in ranks.run(jobs.first_call_in_a_capture):
        assert error == 0
        assert any("while a CUDA graph was captured" in reason for reason in reasons)


def test_memory_goes_back_to_the_driver(ranks):
    for taken, returned, said in ranks.run(jobs.memory_returns):
        assert said == 64 + 2
        assert said <= taken
        assert returned >= said


def test_groups_in_turn(ranks):
    assert max(ranks.run(jobs.groups_in_turn)) <= 1


def test_streams_in_turn(ranks):
    assert ranks.run(jobs.streams_in_turn) == [0] * ranks.world_size


def test_another_current_device(ranks):
    assert max(max(each) for each in ranks.run(jobs.another_current_device)) <= 1


def test_no_buffer_uses_multicast(ranks):
    assert ranks.run(jobs.multicast) == [[0]] * ranks.world_size


@pytest.mark.parametrize("kernel", ["one_shot", "two_shot"])
def test_inductor_s_own_cuda_graphs(ranks, kernel):
    for strategies, error, eager in ranks.run(jobs.compiled, f"reference.symm_mem_{kernel}", 20):
        assert strategies == [f"reference.symm_mem_{kernel}"] * 3
        assert error <= 1.5 * eager


def test_the_sum_in_rank_order(ranks):
    for strategies, error, eager in ranks.run(jobs.compiled, "reference.all_reduce_in_rank_order", 5):
        assert strategies == ["reference.all_reduce_in_rank_order"] * 3
        assert error <= 1.5 * eager
