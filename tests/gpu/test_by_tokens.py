"""One graph for all token counts on real GPUs: on both sides of each threshold, inside and outside of CUDA graphs."""

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.gpu import by_tokens_jobs as jobs

pytestmark = [pytest.mark.cuda(devices=2), pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks():
    with WorkerPool(4 if torch.cuda.device_count() >= 4 else 2, backend="nccl", timeout=300) as pool:
        yield pool


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_each_token_count_takes_its_path(ranks, mode):
    sizes = {16: "fused_one_shot", 17: "fused_two_shot", 64: "fused_two_shot", 65: "symm_mem_two_shot"}
    sizes |= {256: "symm_mem_two_shot", 257: "nccl", 1000: "nccl", 5: "fused_one_shot"}
    for labels, ratios, graphs, report in ranks.run(jobs.crossing, mode, list(sizes)):
        assert labels == [[label] for label in sizes.values()], report
        assert max(ratios) <= 1.1
        assert graphs == 1


def test_deterministic_numerics_give_a_row_the_same_bits(ranks):
    sizes = [2, 3, 17, 64, 256, 257, 1000, 4096]
    assert ranks.run(jobs.bits, sizes) == [[True] * len(sizes)] * ranks.world_size
