"""FlashInfer's real kernels. ``make test-gpu`` runs this on as many GPUs as there are, 2 or 4."""

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.gpu import jobs, llama

TOKENS = [1, 2, 3, 5, 16, 17, 127, 128, 129, 1000, 4096]
ZEROS = 2
"""MiB of the smallest buffer of zeros, which torch's allocator may have in its cache before and keeps there after."""
HIDDEN = [64, 2880, 4096, 5120, 7168, 8192]

pytestmark = [pytest.mark.cuda(devices=2), pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks():
    with WorkerPool(4 if torch.cuda.device_count() >= 4 else 2, backend="nccl", timeout=300) as pool:
        yield pool


@pytest.mark.parametrize("path", jobs.PATHS)
def test_every_kernel_at_every_size(ranks, path):
    # the unfused path is core's: Inductor compiles it for each kernel, hidden size and dtype, in a second or two
    hidden = HIDDEN if path != "unfused" else [4096]
    for calls, off in ranks.run(jobs.grid, path, TOKENS, hidden):
        assert off == []
        assert calls > 300 * len(hidden)


@pytest.mark.parametrize("path", ["one-shot", "two-shot"])
def test_every_kernel_with_programmatic_dependent_launch(ranks, path):
    for calls, off in ranks.run(jobs.grid, path, [1, 17, 1000], [2880, 4096, 8192], True):
        assert off == []
        assert calls > 100


def test_more_rows_than_one_launch_takes(ranks):
    """140 MiB of each rank's: in three launches, and unfused where scales are packed."""
    for off in ranks.run(jobs.in_parts, 9000, 8192):
        assert off == []


def test_the_sum_of_a_row_has_the_same_bits_in_every_batch(ranks):
    """Also in parts, of at most 100 rows."""
    for found in ranks.run(jobs.other_bits_in_another_batch, [1, 2, 3, 5, 33, 128, 1000, 9000], 8192):
        assert found == []


@pytest.mark.parametrize(
    ("tokens", "hidden", "path"), [(1, 8192, "one-shot"), (33, 4096, "two-shot"), (17, 2880, "one-shot")]
)
def test_a_graph_replayed_a_thousand_times(ranks, tokens, hidden, path):
    assert ranks.run(jobs.replays, 1000, tokens, hidden, path) == [0] * ranks.world_size


def test_a_graph_outlives_the_growth_of_its_workspace(ranks):
    for same, small, both in ranks.run(jobs.growth_under_a_graph):
        assert same
        assert both > 2 * small


def test_a_first_call_in_a_capture(ranks):
    for error, reasons in ranks.run(jobs.first_call_in_a_capture):
        assert error == 0
        assert any("while a CUDA graph was captured" in reason for reason in reasons)


def test_memory_goes_back_to_the_driver(ranks):
    for taken, returned, said in ranks.run(jobs.memory_returns):
        assert said > 60
        shared = said - ZEROS
        assert shared <= taken
        assert returned >= shared


def test_groups_in_turn(ranks):
    assert max(ranks.run(jobs.groups_in_turn)) <= 1


def test_streams_in_turn(ranks):
    assert ranks.run(jobs.streams_in_turn) == [0] * ranks.world_size


def test_no_kernel_reaches_multicast(ranks):
    assert ranks.run(jobs.poisoned) == [[]] * ranks.world_size


def test_inductor_s_own_cuda_graphs(ranks):
    for strategies, fused, unfused, magnitude in ranks.run(jobs.reduce_overhead, 20):
        assert strategies == ["flashinfer.all_reduce_add_rms_norm"] * 4
        assert fused <= 1.5 * unfused
        assert magnitude > 1


def test_one_graph_for_token_counts_on_both_sides_of_the_limit(ranks):
    name = "flashinfer.all_reduce_add_rms_norm"
    for choices, errors, graphs in ranks.run(jobs.dynamic_crossing):
        assert choices == [((1, name), (65, f"{name}_two_shot"), (257, None))] * 2
        assert graphs == 1
        assert max(errors) < 0.03


def test_a_hugging_face_llama_generates(ranks):
    outcomes = ranks.run(jobs.llama_generates, 64)
    for found in outcomes:
        prefill, decode = found["strategies"]
        assert len(prefill) == len(decode) >= 2 * llama.LAYERS
        assert all(strategy.startswith("flashinfer.all_reduce") for strategy in prefill + decode)
        assert found["run_time"] == []
        assert found["fused_error"] <= 1.5 * max(found["plain_error"], found["eager_error"]), found
        assert found["same_where_clear"], found
    print(outcomes[0])  # noqa: T201  # for the record
