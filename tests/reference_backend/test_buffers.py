"""The operators over symmetric memory and their buffers over real process groups, with a stand-in for the GPU."""

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.reference_backend import jobs

KERNELS = ["one_shot", "two_shot"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def two():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with WorkerPool(4) as pool:
        yield pool


def test_every_kernel_gives_the_sum(two):
    assert two.run(jobs.every_form, KERNELS, [(1, 64), (3, 256), (5, 2880), (130, 512)]) == [[]] * 2


def test_three_ranks():
    with WorkerPool(3) as pool:
        assert pool.run(jobs.every_form, ["one_shot"], [(1, 64), (5, 2880)]) == [[]] * 3


def test_no_rows_give_no_rows_and_make_no_buffer(two):
    assert two.run(jobs.empty) == [[(0, 64), (2, 0, 64)] * 2] * 2


def test_what_differs_between_ranks_decides_nothing(two):
    assert two.run(jobs.odd_memory) == [[True] * 8] * 2


def test_a_buffer_first_used_for_inference_serves_other_modes(two):
    assert max(max(each) for each in two.run(jobs.modes)) <= 1


def test_no_result_lies_in_the_buffer(two):
    assert max(max(each) for each in two.run(jobs.back_to_back)) <= 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("where", "says", "exchanges"),
    [
        ("fails_to_allocate", "allocating 16 MiB raised RuntimeError: CUDA driver error: out of memory", 0),
        ("fails_to_exchange", "the exchange of handles raised RuntimeError: CUDA driver error: invalid argument", 1),
    ],
)
def test_one_rank_without_a_buffer_sends_all_to_torch(two, rank, where, says, exchanges):
    for distance, reasons, state, left, exchanged in two.run(jobs.one_rank_fails, rank, where):
        assert distance <= 1
        assert reasons == [f"rank {rank}: {says}"] * 2
        assert state == reasons[0]
        assert left == [], "the rank that had made one let go of it"
        assert exchanged == exchanges


def test_after_a_failed_exchange_nobody_tries_another(two):
    for first, second in two.run(jobs.after_a_failed_exchange):
        assert first.startswith("rank 1: the exchange of handles raised")
        assert first in second


def test_an_exchange_that_does_not_end_is_left_behind():
    with WorkerPool(2) as pool:
        for distance, state in pool.run(jobs.slow, 1):
            assert distance <= 1
            assert "rank 1: the exchange of handles raised TimeoutError" in state


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_an_exchange_is_without_multicast_and_with_a_time_limit(two, before):
    for seen, after, patience, afterwards in two.run(jobs.environment, before):
        assert seen == ["1"]
        assert after == before
        assert patience == [30.0]
        assert afterwards > 30


def test_a_kernel_that_is_wrong_here_is_found_and_left_alone(two):
    for distance, state, other in two.run(jobs.wrong_kernel):
        assert distance <= 1, "the model got torch's result"
        assert "reference.symm_mem_two_shot (two_shot) gave results" in state
        assert "times as far from float64" in state
        assert other


def test_a_buffer_grows_to_what_a_wider_model_needs(two):
    # (tokens, hidden) in bfloat16: the target, a longer prompt, the target again
    for seen in two.run(jobs.growth, [(4, 256), (64, 512), (3000, 512), (4, 256)]):
        assert seen == [([MIB], 2 * MIB), ([MIB], 2 * MIB), ([4 * MIB], 6 * MIB), ([4 * MIB], 6 * MIB)]


def test_a_buffer_that_a_graph_may_hold_is_kept_when_a_larger_one_comes(two):
    for seen in two.run(jobs.growth, [(4, 256), (4, 256), (3000, 512), (9000, 512)], 1):
        assert [held for held, _ in seen] == [[MIB], [MIB], [MIB, 4 * MIB], [MIB, 16 * MIB]]


def test_a_buffer_that_cannot_grow_goes_on_as_it_is(two):
    for fused, state in two.run(jobs.growth_fails, 1):
        assert fused == [True, False, False, True]
        assert state.startswith("rank 1: allocating 8 MiB raised")


def test_max_tokens_is_the_capacity(two):
    assert two.run(jobs.capacity, 40) == [([True, False], 40 * 4096 * 4)] * 2
    assert two.run(jobs.capacity, None) == [([True, True], 16 * MIB)] * 2


def test_more_than_the_largest_buffer_goes_through_torch(two):
    assert two.run(jobs.the_largest) == [[True, False, True]] * 2


def test_a_first_call_in_a_capture_goes_through_torch_and_says_so(two):
    for distance, reasons, afterwards in two.run(jobs.captured_first):
        assert distance <= 1
        assert any("came while a CUDA graph was captured" in reason for reason in reasons)
        assert afterwards


def test_ranks_that_exchanged_more_often_than_others_do_not_meet_them():
    with WorkerPool(4) as pool:
        for distances, state in pool.run(jobs.overlapping_groups):
            assert max(distances) <= 1
            assert "the number of earlier exchanges in this process is 1 on rank 0 and 0 on rank 2" in state


def test_groups_have_buffers_of_their_own(four):
    assert four.run(jobs.disjoint_groups) == [[True] * 3] * 4


def test_a_destroyed_group_gives_its_memory_back(two):
    for before, after, distances in two.run(jobs.destroyed_group):
        assert (before, after) == (1, 0)
        assert max(distances) <= 1


def test_memory_is_given_back_when_asked_for(two):
    assert two.run(jobs.released) == [(1, 0, True)] * 2


def test_ranks_that_call_with_different_sizes_hear_of_it():
    with WorkerPool(2) as pool:
        for state in pool.run(jobs.disagreeing):
            assert (
                "call is 'reference.symm_mem_one_shot of (4, 256)' on rank 0 and 'reference.symm_mem_one_shot of (8196, 256)'"
                in state
            )


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_never_comes_holds_nobody_up(rank):
    with WorkerPool(3) as pool:
        states = pool.run(jobs.late, rank)
    assert states.pop(rank) == "late"
    assert len(set(states)) == 1
    assert f"rank {rank} did not take part in what a workspace needs" in states[0]


def test_the_operators_have_fakes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for kernel in KERNELS:
        with FakeTensorMode():
            x = torch.empty(3, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
            found = getattr(torch.ops.fusion_reference, f"symm_mem_{kernel}")(x, "no group", 5)
        assert (found.shape, found.dtype, found.is_contiguous()) == ((2, 3, 64), torch.bfloat16, True)
