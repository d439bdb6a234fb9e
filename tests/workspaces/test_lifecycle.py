"""Workspaces over real process groups: made once, by all ranks or none, whatever goes wrong on one of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fusion_core.workers import WorkerPool
from tests.workspaces import jobs

KIB = 1 << 10
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def two():
    with WorkerPool(2, timeout=300) as pool:
        yield pool


def test_every_pattern_dtype_and_size_is_fused_on_one_buffer_for_a_key(two):
    for fused, first, status, buffers in two.run(jobs.first_calls):
        assert fused == [True] * 9
        assert first == [("", (5, 64))] * 3 + [("", (4, 64))], "its self-check, then the call"
        assert len(status) == buffers == 2
        assert all("acme workspace of group" in line and "2 ranks" in line and "in use" in line for line in status)


def test_a_call_that_the_workspace_does_not_take_runs_unfused(two):
    for seven, eight, reasons in two.run(jobs.none_taken):
        assert (seven, eight) == (False, True)
        assert reasons == ["size: x has 7 rows, needs any other number"]


def test_no_collective_makes_or_checks_a_workspace(two):
    """A rank that goes on without its kernel calls the model's next collective, which another one would be paired with."""
    assert two.run(jobs.collectives) == [(0, 1)] * 2


FAULTS = [
    ("facts", "refuse", "memory", "no memory is left, needs 64 MiB"),
    ("facts", "raise", "workspace", "asking for a workspace's facts raised RuntimeError: facts is out of order"),
    ("create", "raise", "workspace", "making a workspace raised RuntimeError: create is out of order"),
    (
        "the end of create",
        "raise",
        "workspace",
        "making a workspace raised RuntimeError: the end of create is out of order",
    ),
    ("create", "exit", "workspace", "making a workspace raised SystemExit: 3"),
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("where", "kind", "code", "words"), FAULTS, ids=lambda each: str(each)[:8])
def test_what_fails_on_one_rank_sends_all_to_the_unfused_path(two, rank, where, kind, code, words):
    for fused, reasons, states, left in two.run(jobs.one_rank, where, kind, rank):
        assert not fused, "it is not tried again"
        assert reasons == [f"{code}: rank {rank}: {words}"]
        assert states == [f"rank {rank}: {words}"]
        assert left == 0, "the rank that had made one gave it back"


def test_what_does_not_return_on_one_rank_sends_all_to_the_unfused_path(two):
    outcomes = two.run(jobs.one_rank, "create", "late", 1, step=2.0)
    assert len({str(reasons) for _, reasons, _, _ in outcomes}) == 1
    for fused, (reason,), _, left in outcomes:
        assert not fused
        assert reason.endswith(": making a workspace did not end within 2 s"), "rank 1, or 0, which waits for it"
        assert left == 0, "what came too late was given back"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kernel_that_is_wrong_on_one_rank_is_used_on_none_and_others_go_on(two, rank):
    for (fused, (reason,), (state,), left), other in two.run(jobs.another_kernel_afterwards, "wrong", rank, 30.0):
        assert not fused
        assert reason.startswith(f"self_check: rank {rank}: acme.one (one) gave results ")
        assert "times as far from float64 as its dtypes allow on this machine, needs a kernel that is right" in reason
        assert reason.endswith("report it to acme/kernels with `fusion-core verify acme --json`")
        assert reason.endswith(state)
        assert other
        assert left == 1


def test_a_kernel_that_raises_on_every_rank_leaves_the_workspace_to_others(two):
    for (fused, (reason,), _, left), other in two.run(jobs.another_kernel_afterwards, "raise", None, 30.0):
        assert not fused
        assert "the self-check of acme.one raised RuntimeError: run one is out of order" in reason
        assert other
        assert left == 1


@pytest.mark.parametrize("kind", ["raise", "late"])
def test_after_a_kernel_that_some_ranks_ran_alone_the_workspace_is_used_no_more(kind):
    """The one that is left waits for ever: on a GPU nothing ends its kernel."""
    with WorkerPool(2, timeout=120) as pool:  # whose groups are not usable afterwards
        words = {"raise": "raised RuntimeError: run one is out of order", "late": "did not end within 3 s"}[kind]
        for (fused, (reason,), (state,), left), other in pool.run(jobs.another_kernel_afterwards, kind, 1, 3.0):
            assert not fused
            assert "the self-check of acme.one" in reason
            assert words in reason
            assert reason.endswith(state)
            assert not other
            assert left == 1, "a kernel may be in it"


def test_a_workspace_grows_and_the_old_one_goes(two):
    sizes = [(4, 64), (64, 64), (4, 64), (300, 64)]
    expected = [[4 * KIB], [8 * KIB], [8 * KIB], [64 * KIB]]
    assert two.run(jobs.growth, sizes) == [[(True, each) for each in expected]] * 2


def test_a_workspace_that_a_graph_may_hold_is_kept(two):
    sizes = [(4, 64), (4, 64), (64, 64), (300, 64)]
    expected = [[4 * KIB], [4 * KIB], [4 * KIB, 8 * KIB], [4 * KIB, 64 * KIB]]
    assert two.run(jobs.growth, sizes, 1) == [[(True, each) for each in expected]] * 2


def test_a_workspace_that_cannot_grow_goes_on_as_it_is(two):
    sizes = [(4, 64), (64, 64), (65, 64), (6, 64)]
    expected = [True, False, False, True]
    assert two.run(jobs.growth, sizes, fails_at=1) == [[(each, [4 * KIB]) for each in expected]] * 2


def test_nothing_is_made_in_a_capture(two):
    for early, outside, other in two.run(jobs.captured_first):
        ((reason),) = early
        assert reason.startswith(
            "capture: the first call of acme.kernel of (4, 64) came while a CUDA graph was captured"
        )
        assert outside
        assert not other


def test_max_tokens_bounds_the_room(two):
    assert two.run(jobs.capacity, 40) == [[40 * 512]] * 2
    assert two.run(jobs.capacity, None) == [[32 * KIB]] * 2


def test_groups_have_workspaces_of_their_own_that_go_with_them(two):
    assert two.run(jobs.groups) == [([True] * 3, 2, 1)] * 2


def test_release_gives_all_back_and_the_next_call_makes_one_anew(two):
    assert two.run(jobs.released) == [[(1, 1), (0, 0), (1, 1)]] * 2


def test_a_workspace_that_cannot_be_given_back_is_warned_of(two):
    first, second = two.run(jobs.free_raises)
    assert first == []
    assert second == ["fusion_core: giving a acme workspace back raised RuntimeError: free is out of order"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("call", "call is 'acme.kernel of (4, 64)' on rank 0 and 'acme.kernel of (5, 64)' on rank 1"),
        ("version", "version is '1' on rank 0 and '2' on rank 1"),
    ],
)
def test_ranks_that_differ_make_none_and_say_in_what(two, what, words):
    for unfused, (reason,) in two.run(jobs.differing, what):
        assert unfused
        assert reason.startswith(f"agreement: {words}, needs the same graphs, settings, libraries and GPUs")


def test_a_rank_that_never_comes_holds_nobody_up():
    with WorkerPool(3, timeout=120) as pool:
        outcomes = pool.run(jobs.absent, 1)
    assert outcomes.pop(1) == (["absent"], 0.0)
    for reasons, took in outcomes:
        assert ["rank 1 did not take part in what a workspace needs" in each for each in reasons] == [True]
        assert took < 20


@pytest.mark.parametrize(
    "where",
    # the kit ends a process in `create` and `run`: `tests/testing/test_deaths.py`
    ["facts", pytest.param("create", marks=pytest.mark.nightly), pytest.param("run ", marks=pytest.mark.nightly)],
)
def test_the_end_of_a_rank_s_process_holds_nobody_up(where, tmp_path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"from tests.workspaces.jobs import dies; dies({where!r}, {rank}, {store.port})"],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (told, _), (nothing, _) = (rank.communicate(timeout=100) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 3]
    assert nothing == ""
    words = {
        "facts": "rank 1 did not take part in what a workspace needs",
        "create": "rank 0: making a workspace did not end",
        "run ": "rank 0: the self-check of acme.kernel did not end",
    }
    assert told.startswith("None ['")
    assert words[where] in told


def test_zeros_are_shared_read_only_and_kept(two):
    assert two.run(jobs.zeros) == [(True, True, True, (1 << 20) * 2 + (1 << 21) * 2)] * 2


UNFUSED = [
    ("all_reduce", {}),
    ("all_reduce_rms_norm", {}),
    ("all_reduce_add_rms_norm_token_fp8", {"min_scale": 0.0}),
    ("all_reduce_add_rms_norm_group_fp8", {"scale_format": "ue8m0_packed"}),
    ("all_reduce_rms_norm_group_fp8", {"scale_layout": "column_major", "group_size": 64}),
]


@pytest.mark.parametrize(("name", "scalars"), UNFUSED, ids=lambda each: each if isinstance(each, str) else "")
def test_the_unfused_path_gives_what_the_definition_gives(two, name, scalars):
    for sizes in two.run(jobs.unfused, name, scalars, [6, 13, 0]):
        for distance, forms in sizes:
            assert distance <= 1
            for key, found, expected in forms:
                assert found == expected, key


def test_results_of_other_strides_get_those_of_the_definition():
    from fusion_core.dispatch.bound_pattern import BoundPattern
    from fusion_core.dispatch.strides import Strides

    place = BoundPattern(jobs.PATTERNS["all_reduce_rms_norm"], ("normed",), ("weight",), {"eps": 1e-5}, "tp")
    transposed = torch.arange(12.0).view(4, 3).t()
    (found,) = Strides(place).settled(torch.ones(3, 4), [torch.ones(4)], (transposed,))
    assert found.stride() == (4, 1)
    assert torch.equal(found, transposed)


def test_deadlines():
    import threading

    from fusion_core.workspaces.deadline import TooLate, within

    assert within(5.0, lambda: 3, print) == 3
    with pytest.raises(KeyError):
        within(5.0, lambda: {}[1], print)
    go, late = threading.Event(), []
    done = threading.Event()
    with pytest.raises(TooLate):
        within(0.01, lambda: go.wait() and 4, lambda found: (late.append(found), done.set()))
    go.set()
    assert done.wait(5.0)
    assert late == [4]


def test_too_little_memory(monkeypatch):
    from fusion_core.workspaces import too_little_memory

    free, emptied = [5 << 20], []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 9 << 20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: (emptied.append(1), free.__setitem__(0, 6 << 20)))
    gpu = torch.device("cuda", 0)
    assert too_little_memory(torch.device("cpu"), 1 << 60) is None
    assert too_little_memory(gpu, 4 << 20, 1 << 20) is None
    assert emptied == []
    assert too_little_memory(gpu, 4 << 20, 2 << 20) is None, "what torch's cache held was enough"
    assert emptied == [1]
    words = "6 MiB of GPU memory are free, and the workspace takes 6 MiB, needs more free memory; leave the model's allocator less, or set FusionConfig(max_tokens=...)"
    assert str(too_little_memory(gpu, 6 << 20, 1)) == words
