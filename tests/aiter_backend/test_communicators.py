"""AITER's communicators over real process groups: when they are made, how they are called, how they go."""

import pytest

from fusion_aiter.stages import MOST
from fusion_core.workers import WorkerPool
from tests.aiter_backend import jobs
from tests.aiter_backend.jobs import ADD, NORM

MIB = 1 << 20
POOLS = ("two", pytest.param("older", marks=pytest.mark.nightly))
"""Of gfx950; and of gfx942, for which the calls are the same code with the other FP8 dtype."""


def workers(arch, world_size):
    with WorkerPool(world_size) as pool:
        yield lambda job, *args, **kwargs: pool.run(jobs.on, arch, job, *args, **kwargs)


@pytest.fixture(scope="module")
def two():
    yield from workers("gfx950", 2)


@pytest.fixture(scope="module")
def four():
    yield from workers("gfx950", 4)


@pytest.fixture(scope="module")
def older():
    yield from workers("gfx942", 2)


# when they are made


def test_the_first_call_makes_one_communicator_and_later_ones_none(two):
    for first, later, backend, same, ranks in two(jobs.first_calls):
        assert later == first
        assert first == [{"group": "ProcessGroup", "device": "device", "max_size": 64 * MIB, "enable_register_for_capturing": False}]  # fmt: skip
        assert (backend, same, ranks) == ("gloo", False, [0, 1])


def test_max_tokens_bounds_the_rows_and_the_size(two):
    for seen in two(jobs.bounded, [(4, 512), (16, 512), (17, 512), (16, 1024)], 16):
        assert seen == [(True, [MIB], 0), (True, [MIB], 0), (False, [MIB], 0), (True, [MIB], 0)]


def test_a_wider_call_makes_a_larger_one_and_closes_the_old(two):
    for seen in two(jobs.bounded, [(4, 512), (100, 8192), (4, 512)], 100):
        assert seen == [(True, [MIB], 0), (True, [MIB, 2 * MIB], 1), (True, [MIB, 2 * MIB], 1)]


def test_without_max_tokens_the_first_one_takes_all_that_is_ever_fused(two):
    for seen in two(jobs.bounded, [(4, 512), (300, 8192)], None):
        assert seen == [(True, [64 * MIB], 0), (True, [64 * MIB], 0)]


def test_one_that_a_graph_may_hold_is_kept_until_the_end(two):
    for seen in two(jobs.grown_after_a_capture):
        # the second was never captured and goes when the third comes; the first goes at the end
        assert seen == [(1, 0, True), (2, 0, True), (3, 1, True), (3, 3, False)]


@pytest.mark.parametrize("name", [NORM, ADD])
def test_a_first_call_in_a_capture_runs_unfused_and_says_so(two, name):
    for early, (called, why), known, others, why_others in two(jobs.captured_first, name):
        assert early <= 1
        assert called == [], "nothing of AITER's was called"
        ((code, words),) = why
        assert code == "capture"
        assert f"the first call of aiter.{name} of (4, 512) came while a CUDA graph was captured" in words
        assert known == 1, "what is known runs fused in a capture"
        assert others == known, "a kernel that was not checked does not"
        assert [code for code, _ in why_others] == ["capture"]


def test_rows_of_which_the_self_check_has_room_for_few(two):
    """The check of a kernel takes several rows where the call takes one: it may not ask for more than there is."""
    assert two(jobs.wide_rows) == [[True, True]] * 2


def test_rows_of_one_load(two):
    assert two(jobs.narrow_rows) == [True] * 2


# how they are called


@pytest.mark.parametrize("pool", POOLS)
def test_every_call_is_by_keywords_and_never_registered(request, pool):
    for calls in request.getfixturevalue(pool)(jobs.everything):
        methods = {each["method"] for each in calls}
        assert methods == {"__init__", "should_custom_ar", "all_reduce", "fused_ar_rms", "fused_ar_rms_per_group_quant", "fused_ar_rms_mxfp4_quant"}  # fmt: skip
        assert [each for each in calls if each["error"]] == []
        for each in calls:
            if each["method"] == "should_custom_ar":
                assert each["kwargs"] == {}
                continue
            assert each["args"] == ()
            if each["method"] == "all_reduce":
                assert each["kwargs"]["registered_input"] is False
                assert each["kwargs"]["open_fp8_quant"] is False
            elif each["method"] != "__init__":
                assert each["kwargs"]["registered"] is False
                assert isinstance(each["kwargs"]["use_1stage"], bool)


@pytest.mark.parametrize("pool", POOLS)
def test_any_leading_dimensions_and_any_layout_of_scales(request, pool):
    for off in request.getfixturevalue(pool)(jobs.shapes):
        assert off == []


def test_what_differs_between_ranks_is_copied_and_decides_nothing(two):
    for off in two(jobs.odd_memory):
        assert off == []


@pytest.mark.parametrize("after", [False, True])
def test_no_rows_give_no_rows_and_call_nothing(two, after):
    for shapes, communicators in two(jobs.empty, after):
        assert communicators == after
        assert all(0 in shape for shape in shapes)


def test_what_is_too_large_for_aiter_runs_unfused(two):
    assert MOST == 64 * MIB
    row = 512 * 2
    assert two(jobs.too_large, 16 * row, [15, 16, 17, 4]) == [[True, True, False, True]] * 2


def test_a_pattern_without_residual_gives_zeros_that_nobody_writes(two):
    for zeros, one_buffer, unwritten, lasts in two(jobs.zeros_given):
        assert zeros
        assert one_buffer, "not zeros anew for each call"
        assert unwritten
        assert lasts, "a CUDA graph reads them still"


FP8, MXFP4 = "all_reduce_add_rms_norm_token_fp8", "all_reduce_rms_norm_mxfp4"
GROUPS = "all_reduce_rms_norm_group_fp8_out"

STAGES = {
    # gfx942: one stage where the user asks for it and never else
    "older": [
        (ADD, 512, 1, False, False),
        (FP8, 512, 1, False, False),
        (GROUPS, 512, 4, False, False),
        (MXFP4, 512, 4, False, False),
        (ADD, 512, 1, True, True),
        (FP8, 512, 1, True, True),
        (GROUPS, 512, 600, True, True),
        (MXFP4, 512, 4, True, True),
        (ADD, 16384, 3, True, False),  # too wide for one
        (FP8, 2880, 4, False, None),  # no whole number of warps: wrong in two
        (FP8, 2880, 4, True, True),
        (MXFP4, 1024, 257, False, None),  # more than two stages hold
        (MXFP4, 1024, 257, True, True),
    ],
    # gfx950, two ranks: both send the same bytes, so one stage whatever the size
    "two": [
        (ADD, 512, 1, False, True),
        (ADD, 512, 600, False, True),
        (FP8, 1024, 600, False, True),
        (NORM, 8192, 40, False, True),
        (NORM, 16384, 3, False, False),
    ],
    # gfx950, four ranks: below 256 KiB
    "four": [
        (ADD, 512, 1, False, True),
        (ADD, 512, 255, False, True),
        (ADD, 512, 256, False, False),
        (ADD, 512, 256, True, False),
        (FP8, 1024, 127, False, True),
        (FP8, 1024, 128, False, False),
        (GROUPS, 1024, 300, False, False),
        (MXFP4, 1024, 128, False, False),
        (MXFP4, 1024, 257, False, True),
        (FP8, 2880, 100, False, True),
        (NORM, 16384, 2, False, False),
    ],
}


@pytest.mark.parametrize("pool", [*POOLS, "four"])
def test_the_number_of_stages(request, pool):
    table = STAGES[pool]
    for found in request.getfixturevalue(pool)(jobs.stages_run, [row[:4] for row in table]):
        assert dict(zip([row[:4] for row in table], found, strict=True)) == {row[:4]: row[4] for row in table}


# several groups


def test_groups_that_ranks_come_to_in_different_orders(four):
    for distances in four(jobs.groups_in_turn):
        assert max(max(each) for each in distances) <= 1


@pytest.mark.parametrize("more", [1, 5])
def test_ranks_that_have_made_different_numbers_of_communicators(two, more):
    for fused, numbers in two(jobs.odd_counts, more):
        assert fused
        assert len(set(numbers)) == 1


# how they go


def test_a_destroyed_group_gives_its_memory_back(two):
    for before, after, status, distances in two(jobs.destroyed_group):
        assert (before, after, status) == (1, 0, [])
        assert max(distances) <= 1


def test_ranks_close_together(two):
    (_, closed), (late, _) = two(jobs.released_apart, 0.5)
    assert closed > late, "a rank that closes before its peer has come ends it, where that still reads"


def test_what_not_all_ranks_give_back_is_kept_open_and_holds_nobody_up(two):
    for closed, kept, fused, made in two(jobs.released_alone):
        assert (closed, kept) == (0, 1)
        assert fused, "the next call makes a new one"
        assert made == 2


def test_release_closes_and_the_next_call_makes_a_new_one(two):
    for seen in two(jobs.released):
        assert seen == [(1, 0, 1, True), (1, 1, 0, False), (2, 1, 1, True)]


def test_status(two):
    taken = (3 * 64 + 8) * MIB
    for before, first, zeros in two(jobs.status):
        assert before == []
        ((subject, memory, state),) = first
        assert subject.startswith("communicator of group ")
        assert subject.endswith(", 2 ranks")
        assert (memory, state) == (taken, "in use")
        assert zeros == [(subject, taken + 2 * MIB, "in use")]


def test_a_bad_rocm_release_is_warned_of_once(two):
    assert two(jobs.warned) == [["RuntimeWarning: ROCm is 7.2.0"]] * 2
