"""What goes wrong with AITER's communicators: on one rank or all, every rank goes the same way, and none waits for ever."""

from types import SimpleNamespace

import pytest
import torch

from fusion_aiter import creation, library
from fusion_aiter.communicators import MARGIN, Aiter
from fusion_core.workers import WorkerPool
from fusion_core.workspaces.facts import difference, facts_of, unreachable
from tests.aiter_backend import failing_jobs, jobs
from tests.aiter_backend.failing_jobs import TOKEN_FP8
from tests.aiter_backend.jobs import ADD, NORM

MIB = 1 << 20


def workers(arch, world_size):
    with WorkerPool(world_size) as pool:
        yield lambda job, *args, **kwargs: pool.run(jobs.on, arch, job, *args, **kwargs)


@pytest.fixture(scope="module")
def two():
    yield from workers("gfx950", 2)


@pytest.fixture(scope="module")
def older():
    yield from workers("gfx942", 2)


def unfused(outcomes, code, words, left_open=0):
    """All ranks run right and unfused, for one reason, which the status has as well."""
    for distance, reasons, states, calls, left in outcomes:
        assert distance <= 1
        ((found, reason),) = reasons
        assert found == code
        assert words in reason
        assert states == [reason]
        assert calls == 0
        assert left == left_open if isinstance(left_open, int) else left in left_open
    assert len({str(reasons) for _, reasons, *_ in outcomes}) == 1


# before one is made


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
@pytest.mark.parametrize(
    "error", [RuntimeError("ROCm version file not found"), AssertionError("no hipcc"), KeyError("gfx000")], ids=repr
)
def test_one_rank_whose_aiter_does_not_import_sends_all_to_the_unfused_path(two, rank, error):
    outcomes = two(failing_jobs.import_fails, rank, error)
    unfused([outcome for outcome, *_ in outcomes], "import", f"rank {rank}: importing aiter raised {type(error).__name__}: {error}")  # fmt: skip
    for (_, reasons, *_), others, later in outcomes:
        assert others == reasons, "the other kernel's sites say it too"
        assert later, "given back, it is tried anew"


def test_a_default_group_without_a_tcp_store(tmp_path):
    with WorkerPool(2) as pool:
        outcomes = pool.run(jobs.on, "gfx950", failing_jobs.over_a_file, str(tmp_path / "store"))
    unfused(outcomes, "store", "the default process group meets over a FileStore, needs a TCPStore")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_setting_of_aiter_that_one_rank_has(two, rank):
    values = ("'4096' on rank 0 and ''", "'' on rank 0 and '4096'")[rank]
    unfused(two(failing_jobs.other_window, rank), "agreement", f"AITER_CUSTOM_AR_MAX_SIZE is {values} on rank 1")


@pytest.mark.parametrize(
    ("given", "fused", "bytes_of"),
    [
        ({"MAX": "4096"}, [True, True, False], [5120]),
        ({"MAX": "0"}, [False, False, False], [2048, 4096, 5120]),
        ({"MIN": "2048"}, [False, True, True], [2048]),
    ],
)
def test_what_aiter_does_not_take_runs_unfused_on_all_ranks(two, given, fused, bytes_of):
    for found, reasons in two(failing_jobs.window, given, [2, 4, 5]):
        assert found == fused
        assert [code for code, _ in reasons] == ["size"] * len(bytes_of)
        for size, (_, words) in zip(bytes_of, reasons, strict=True):
            assert words.startswith(f"AITER does not take {size} bytes")
            assert "AITER_CUSTOM_AR_MAX_SIZE" in words


def test_ranks_that_call_with_different_sizes_hear_of_it():
    with WorkerPool(2) as pool:
        for state in pool.run(jobs.on, "gfx950", failing_jobs.disagreeing):
            assert (
                "call is 'aiter.all_reduce of (4, 512)' on rank 0 and 'aiter.all_reduce of (5, 512)' on rank 1" in state
            )


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_rank_that_never_comes_holds_nobody_up(rank):
    with WorkerPool(2) as pool:
        outcomes = pool.run(jobs.on, "gfx950", failing_jobs.late, rank)
    assert outcomes.pop(rank)[0] == "late"
    ((state, took),) = outcomes
    assert f"rank {rank} did not take part in what a workspace needs" in state
    assert took < 30


FACTS = {
    "call": "all_reduce of (4, 512)", "max_size": 64 * MIB, "host": "a", "arch": "gfx950", "release": "v0.1.20 or later",
    "AITER_CUSTOM_AR_MAX_SIZE": "", "AITER_CUSTOM_AR_MIN_SIZE": "", "gpu": "GPU-0", "made": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, None),
        ({"made": 3}, None),
        ({"gpu": "GPU-0"}, "two ranks use one GPU, needs a GPU for each rank; call torch.cuda.set_device first"),
        ({"host": "b"}, "the group's ranks are on several hosts, needs one host, with its GPUs linked"),
        ({"arch": "gfx942"}, "arch is 'gfx950' on rank 0 and 'gfx942' on rank 1, needs the same graphs, settings, "),
        ({"release": "v0.1.19.post2"}, "release is 'v0.1.20 or later' on rank 0 and 'v0.1.19.post2' on rank 1"),
        (
            {"call": "all_reduce of (5, 512)"},
            "call is 'all_reduce of (4, 512)' on rank 0 and 'all_reduce of (5, 512)' on",
        ),
        ({"max_size": MIB}, "max_size is 67108864 on rank 0 and 1048576 on rank 1"),
        ({"AITER_CUSTOM_AR_MIN_SIZE": "1"}, "AITER_CUSTOM_AR_MIN_SIZE is '' on rank 0 and '1' on rank 1"),
    ],
)
def test_what_must_not_differ_between_ranks(other, words):
    reason = difference([FACTS, {**FACTS, "gpu": "GPU-1", **other}], Aiter.may_differ)
    assert (reason is None) if words is None else str(reason).startswith(words)


def on_gpu(index):
    """A call on that GPU, of which this machine has none."""
    return SimpleNamespace(x=SimpleNamespace(device=torch.device("cuda", index)))


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs as torch shows them; gives a dict to say what is free and which pairs are not linked."""
    given = {"free": [80 << 30], "apart": set(), "emptied": 0}

    def emptied():
        given["emptied"] += 1

    def free(device):
        return given["free"].pop() if len(given["free"]) > 1 else given["free"][0], 192 << 30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} not in given["apart"])
    monkeypatch.setattr(creation, "default_store", lambda: "TCPStore")
    monkeypatch.setattr(library, "module", lambda: SimpleNamespace(IPCBufferPool=SimpleNamespace(_pool_seq=7)))
    return given


def test_gpus_that_are_not_linked(gpus):
    ranks = [{**FACTS, "gpu": f"GPU-{index}"} for index in (0, 1, 3)]
    device = torch.device("cuda", 1)
    assert unreachable(ranks, device) is None
    gpus["apart"] = [{0, 2}]
    assert unreachable(ranks, device) is None
    gpus["apart"] = [{1, 3}]
    assert (
        str(unreachable(ranks, device)) == "GPU 1 cannot access the memory of GPU 3, that of rank 2, needs linked GPUs"
    )
    assert unreachable(ranks, torch.device("cuda", 0)) is None, "the others find it, and all ranks agree"
    assert unreachable(ranks, torch.device("cpu")) is None


def test_a_gpu_that_this_process_cannot_see_is_not_asked_about(gpus):
    gpus["apart"] = [{0, other} for other in range(4)]
    elsewhere = {**FACTS, "gpu": "GPU-of-another-process"}
    assert unreachable([FACTS, elsewhere], torch.device("cuda", 0)) is None


def test_what_a_rank_tells_the_others(gpus):
    call = on_gpu(2)
    found, problem = Aiter().facts(call, 64 * MIB)
    assert problem is None
    assert (found["made"], found["max_size"]) == (7, 64 * MIB)
    assert facts_of(call)["gpu"] == "GPU-2"
    again, _ = Aiter().facts(call, 64 * MIB)
    assert found.pop("token") != again.pop("token")
    assert found == again


def test_too_little_memory_is_found_before_aiter_ends_the_process(gpus):
    call, needed = on_gpu(0), creation.memory(64 * MIB) + MARGIN
    assert creation.memory(64 * MIB) == 200 * MIB
    gpus["free"] = [needed]
    assert Aiter().facts(call, 64 * MIB)[1] is None
    assert gpus["emptied"] == 0
    gpus["free"] = [needed - 1]
    words = "263 MiB of GPU memory are free, and the workspace takes 200 MiB, needs more free memory; leave the model's allocator less, or set FusionConfig(max_tokens=...)"  # fmt: skip
    assert str(Aiter().facts(call, 64 * MIB)[1]) == words
    assert gpus["emptied"] == 1
    gpus["free"] = [needed, needed - 1]  # what torch's cache held was enough
    assert Aiter().facts(call, 64 * MIB)[1] is None


# while one is made


@pytest.mark.parametrize("ranks", [[0, 1], pytest.param([0], marks=pytest.mark.nightly), [1]])
def test_a_communicator_that_aiter_disabled(two, ranks):
    outcomes = two(failing_jobs.constructor_fails, ranks, "disabled")
    first = "" if len(ranks) == 2 else f"rank {ranks[0]}: "
    words = "making a workspace raised RuntimeError: AITER disabled its communicator; its log"
    # a rank that made one keeps it: its peer does not come to close it
    unfused([outcome for outcome, *_ in outcomes], "workspace", first + words, left_open=(0, 1))
    assert [outcome[4] for outcome, *_ in outcomes] == [int(rank not in ranks) for rank in (0, 1)]
    assert all(later for *_, later in outcomes)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
@pytest.mark.parametrize("kind", ["before", "after"])
def test_one_rank_whose_communicator_does_not_come_up(two, rank, kind):
    outcomes = two(failing_jobs.constructor_fails, [rank], kind)
    words = f"rank {rank}: making a workspace raised RuntimeError: hipIpc"
    unfused([outcome for outcome, *_ in outcomes], "workspace", words, left_open=(0, 1))
    for (*_, left), closed, later in outcomes:
        assert left + closed <= 1
        assert later
    assert closed == 0


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_communicator_that_cannot_grow_goes_on_as_it_is(two, rank):
    for fused, (state,), is_open in two(failing_jobs.growth_fails, rank):
        assert fused == [True, True, False, False, True]
        assert state.startswith(f"rank {rank}: making a workspace raised RuntimeError: hipIpcOpenMemHandle")
        assert is_open


# once one is made

KINDS = {
    ADD: "plain",
    NORM: "plain",
    TOKEN_FP8: "token_fp8",
    "all_reduce_rms_norm_group_fp8": "group_fp8",
    "all_reduce_add_rms_norm_mxfp4": "mxfp4",
}


@pytest.mark.parametrize("ranks", [pytest.param([0, 1], marks=pytest.mark.nightly), [1]])
@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_a_kernel_that_is_wrong_here_is_found_and_left_alone(two, name, kind, ranks):
    right = ["all_reduce", *(other for other, its in KINDS.items() if its != kind)]
    outcomes = two(failing_jobs.wrong_kernel, name, kind, ranks, right)
    reasons = [reasons for (_, reasons, *_), _ in outcomes]
    assert reasons[0] == reasons[1]
    for (distance, ((code, words),), states, *_), others in outcomes:
        assert distance <= 1, "the model gets the unfused result"
        assert code == "self_check"
        assert "in one stage) gave results" in words
        assert "times as far from float64 as its dtypes allow on this machine" in words
        assert states == [words]
        assert all(others), "the other kernels go on"


@pytest.mark.parametrize(
    "name", [TOKEN_FP8, pytest.param("all_reduce_rms_norm_group_fp8_out", marks=pytest.mark.nightly)]
)
def test_a_kernel_that_is_wrong_for_large_inputs_alone(older, name):
    kind = "token_fp8" if "token" in name else "group_fp8"
    for fused, checked, reasons in older(failing_jobs.wrong_when_large, name, kind):
        assert fused == [True, True, False, False, True]
        assert checked == [257] * 3, "at the least size that it runs at"
        ((code, words),) = reasons
        assert code == "self_check"
        assert "in two stages) gave results" in words


def test_methods_that_give_nothing(two):
    for kernels in two(failing_jobs.nothing_given, False):
        for distance, reasons, later in kernels:
            assert distance <= 1
            assert [code for code, _ in reasons] == ["self_check"]
            assert "raised RuntimeError: the kernel gave nothing" in reasons[0][1]
            assert not later


def test_methods_that_give_nothing_after_their_check(two):
    for kernels in two(failing_jobs.nothing_given, True):
        for distance, reasons, later in kernels:
            assert distance <= 1
            assert reasons == []
            assert later
