"""FlashInfer's operators and workspaces over real process groups, with a stand-in for the GPU's kernels."""

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.flashinfer_backend import failing_jobs, jobs


@pytest.fixture(scope="module")
def two():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with WorkerPool(4) as pool:
        yield pool


@pytest.mark.parametrize("two_shot", [False, True])
def test_every_kernel_gives_what_its_pattern_means(two, two_shot):
    rows = [(1, 64), (3, 256), (5, 2880), (130, 512)]
    for off in two.run(jobs.all_kernels, rows, [torch.bfloat16, torch.float16, torch.float32], two_shot):
        assert off == []


@pytest.mark.parametrize("two_shot", [False, True])
def test_a_release_whose_inner_function_moved_is_called_by_its_public_one(two, two_shot):
    for off in two.run(jobs.all_kernels, [(2, 256), (3, 256)], [torch.bfloat16], two_shot, moved=True):
        assert off == []


def test_any_leading_dimensions(two):
    for name in ("all_reduce", "all_reduce_add_rms_norm", "all_reduce_add_rms_norm_token_fp8_out", "all_reduce_rms_norm_group_fp8"):  # fmt: skip
        assert max(two.run(jobs.run, name, 6, lead=(2, 3))) <= 1


def test_no_rows_give_no_rows_and_call_nothing(two):
    for shapes in two.run(jobs.empty, (0,)) + two.run(jobs.empty, (2, 0)):
        assert all(0 in shape for shape in shapes)


def test_two_shot_runs_one_shot_with_no_more_tokens_than_ranks(two, four):
    """FlashInfer's two-shot kernel asserts more."""
    sizes = [1, 2, 3, 4, 5, 100]
    assert two.run(jobs.shots, sizes, two_shot=False) == [[[True]] * 6] * 2
    assert two.run(jobs.shots, sizes, two_shot=True) == [[[True]] * 2 + [[False]] * 4] * 2
    assert four.run(jobs.shots, sizes, two_shot=True) == [[[True]] * 4 + [[False]] * 2] * 4


FORMS = ("all_reduce", "all_reduce_add_rms_norm", "all_reduce_add_rms_norm_group_fp8")
"""A launch without a norm, one with it, and one whose scales have a layout of the whole."""


@pytest.mark.parametrize(
    ("two_shot", "names"),
    [
        (False, FORMS),
        pytest.param(False, None, marks=pytest.mark.nightly),
        pytest.param(True, None, marks=pytest.mark.nightly),
    ],
)
def test_more_rows_than_one_launch_takes_go_in_parts_of_one_size(two, two_shot, names):
    launches = {15: [15], 16: [16], 17: [9, 8], 32: [16, 16], 33: [11, 11, 11], 50: [13, 13, 13, 11]}
    for found in two.run(jobs.parts, 16, list(launches), names, two_shot=two_shot):
        assert len(found) == (15 if names is None else len(names))
        for name, calls in found.items():
            if "group_fp8" in name:
                assert calls == [each if len(each) == 1 else [] for each in launches.values()], name
            else:
                assert calls == list(launches.values()), name


@pytest.mark.parametrize("name", ["all_reduce", "all_reduce_add_rms_norm", "all_reduce_add_rms_norm_token_fp8_out"])
def test_parts_have_the_rows_of_all_leading_dimensions(two, name):
    for distance, calls in two.run(jobs.parts_with_leading_dimensions, name):
        assert distance <= 1
        assert calls == [(3, False)] * 3


def test_a_part_may_be_too_small_for_two_shot(four):
    for distance, calls in four.run(jobs.parts_with_leading_dimensions, "all_reduce_add_rms_norm_static_fp8"):
        assert distance <= 1
        assert calls == [(3, True)] * 3


def test_a_part_that_cannot_be_fused_sends_all_to_the_unfused_path(two):
    for calls, distance, reasons in two.run(failing_jobs.a_part_that_is_wrong):
        assert calls == [(4, False)] * 2
        assert distance <= 1
        assert "times as far from float64" in "".join(reasons.values())


def test_more_rows_than_max_tokens_run_unfused_but_where_they_never_may(two):
    sizes = [7, 8, 9, 17, 40]
    in_parts = [[7], [8], [5, 4], [6, 6, 5], [8] * 5]
    names = ["all_reduce", "all_reduce_add_rms_norm_token_fp8", "all_reduce_add_rms_norm_group_fp8"]
    for always, expected in ((False, [[7], [8], [], [], []]), (True, in_parts)):
        for found in two.run(jobs.parts, 1000, sizes, names, max_tokens=8, always=always):
            assert found.pop("all_reduce_add_rms_norm_group_fp8") == [[7], [8], [], [], []]
            assert found["all_reduce"] == found["all_reduce_add_rms_norm_token_fp8"] == expected
    # neither bound is passed
    for found in two.run(jobs.parts, 6, [12, 13], ["all_reduce"], max_tokens=8, always=True):
        assert found["all_reduce"] == [[6, 6], [5, 5, 3]]


def test_deterministic_numerics_never_run_the_sum_unfused(two):
    sizes = [3, 8, 9, 20]
    for found, elements in two.run(jobs.deterministic, 8, sizes, "deterministic"):
        assert found == [[3], [8], [5, 4], [7, 7, 6]]
        assert elements == 8 * 256
    for found, _ in two.run(jobs.deterministic, 8, sizes, "default"):
        assert found == [[3], [8], [], []]


def test_what_differs_between_ranks_is_copied_and_decides_nothing(two):
    assert two.run(jobs.odd_memory) == [[0.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ({}, "all_reduce_add_rms_norm"),
        ({"two_shot": True}, "all_reduce_add_rms_norm_two_shot"),
        ({"pdl": True}, "all_reduce_add_rms_norm_pdl"),
        ({"two_shot": True, "pdl": True}, "all_reduce_add_rms_norm_two_shot_pdl"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_one_rank_without_a_workspace_sends_all_to_the_unfused_path(two, rank, where, name):
    says_who_failed(two.run(failing_jobs.one_rank_fails, rank, **where), rank, name)


def test_the_reason_is_that_of_the_rank_that_failed_whoever_votes_first(two):
    says_who_failed(two.run(failing_jobs.one_rank_fails_and_is_slow_to_say_so, 0), 0, "all_reduce_add_rms_norm")


def says_who_failed(outcomes, rank, name):
    assert len({str(reasons) for _, reasons, _, _ in outcomes}) == 1
    for distance, reasons, state, left in outcomes:
        assert distance <= 1
        assert list(reasons) == [f"flashinfer.{name}"]
        (reason,) = reasons.values()
        assert reason.startswith(f"rank {rank}: making a workspace raised RuntimeError: cuMemCreate: out of memory")
        assert state == reason
        assert left == 0, "the rank that had made one gave it back"


def test_confidential_computing_is_refused_because_it_means_multicast(two):
    for state in two.run(failing_jobs.with_multicast):
        assert "confidential computing" in state


def test_a_workspace_with_multicast_is_never_used(two):
    for state in two.run(failing_jobs.multicast_uninvited):
        assert "uses NVLink multicast, which nobody asked for" in state


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (1, "all_reduce_add_rms_norm"),
        (2, "all_reduce_rms_norm_static_fp8"),
        (11, "all_reduce_add_rms_norm_token_fp8_out"),
    ],
)
def test_a_kernel_that_is_wrong_here_is_found_and_left_alone(two, code, name):
    for distance, state, other in two.run(failing_jobs.wrong_kernel, code, name):
        assert distance <= 1, "the model got the unfused result"
        assert "times as far from float64" in state
        assert other <= 1, "the other kernels go on"


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize(("code", "name"), [(0, "all_reduce"), (8, "all_reduce_rms_norm_group_fp8")])
def test_each_form_is_checked_by_itself(two, code, name, one_shot):
    wrong = f"flashinfer.{name}" + ("" if one_shot else "_two_shot")
    for fused, reasons in two.run(failing_jobs.wrong_form, code, name, one_shot):
        assert fused == [not one_shot, one_shot]
        assert list(reasons) == [wrong]
        assert "times as far from float64" in reasons[wrong]


@pytest.mark.parametrize("scale_layout", ["linear", "swizzled_128x4"])
def test_a_kernel_that_writes_nothing_is_found(two, scale_layout):
    """FlashInfer's FP4 kernels below capability 10: zeros, and no error."""
    for (problem,) in two.run(failing_jobs.fp4_check, scale_layout):
        assert "times as far from float64" in problem


def test_a_workspace_grows_to_what_a_wider_model_needs(two):
    least = 1 << 20
    # (tokens, hidden): the target, a wider draft model, a longer prompt, the target again
    for seen in two.run(jobs.growth, [(4, 256), (64, 512), (3000, 512), (4, 256)]):
        assert seen == [(1, least), (1, least), (1, 2 * least), (1, 2 * least)]


def test_a_workspace_that_cannot_grow_goes_on_as_it_is(two):
    for fused, state in two.run(failing_jobs.growth_fails, 1):
        assert fused == [True, False, False, True]
        assert state.startswith("rank 1: making a workspace raised")


def test_a_workspace_that_a_graph_may_hold_is_kept_when_a_larger_one_comes(two):
    for seen in two.run(jobs.growth, [(4, 256), (4, 256), (3000, 512), (9000, 512)], 1):
        assert [count for count, _ in seen] == [1, 1, 2, 2]


def test_a_first_call_in_a_capture_runs_unfused_and_says_so(two):
    for distance, reasons in two.run(jobs.captured_first):
        assert distance <= 1
        assert any("came while a CUDA graph was captured" in reason for reason in reasons)


def test_max_tokens_is_the_capacity(two):
    assert two.run(jobs.capacity, 40) == [[True, False, 40 * 256]] * 2


def test_groups_and_dtypes_have_workspaces_of_their_own(four):
    for distances in four.run(jobs.two_groups):
        assert max(distances) <= 1


def test_a_destroyed_group_gives_its_memory_back(two):
    for before, after, distances in two.run(jobs.destroyed_group):
        assert (before, after) == (1, 0)
        assert max(distances) <= 1


def test_ranks_that_call_with_different_sizes_hear_of_it():
    with WorkerPool(2) as pool:
        for state in pool.run(failing_jobs.disagreeing):
            assert (
                "call is 'flashinfer.all_reduce of (4, 256)' on rank 0 and 'flashinfer.all_reduce of (8196, 256)' on rank 1"
                in state
            )


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_a_rank_that_never_comes_holds_nobody_up(rank):
    with WorkerPool(3) as pool:
        states = pool.run(failing_jobs.late, rank)
    assert states.pop(rank) == "late"
    assert len(set(states)) == 1
    assert f"rank {rank} did not take part in what a workspace needs" in states[0]
