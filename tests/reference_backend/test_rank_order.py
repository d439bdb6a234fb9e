"""The all_reduce in rank order over real process groups."""

import pytest
import torch

from fusion_core.workers import WorkerPool
from fusion_reference.rank_order import all_reduce_in_rank_order
from tests.reference_backend import rank_order_jobs as jobs


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request):
    with WorkerPool(request.param) as pool:
        yield pool


@pytest.mark.parametrize("shape", [(33, 96), (5, 2880), (2, 3, 64)])
def test_it_is_no_further_from_float64_than_the_group_s_own(ranks, shape):
    for found in ranks.run(jobs.errors, shape):
        assert len(found) == 4
        for dtype, own, gloo in found:
            assert own <= gloo, dtype


def test_it_is_rounded_once_and_added_in_the_order_of_the_ranks(ranks):
    once = {1: 256.0, 2: 256.0, 3: 258.0}[ranks.world_size]  # 257 rounds to 256 in bfloat16
    ordered = {1: 1.0, 2: 2.0, 3: 0.0}[ranks.world_size]  # 2**24 + 1 is 2**24 in float32; in another order the sum is 1
    assert ranks.run(jobs.rounded_once) == [[[once] * 2, [ordered] * 2]] * ranks.world_size


def test_a_row_has_the_same_bits_in_every_batch(ranks):
    found = ranks.run(jobs.same_bits, [1, 5, 33], 2880, [torch.bfloat16, torch.float16, torch.float32])
    assert found == [[True] * 9] * ranks.world_size


def test_inductor_s_kernels_keep_the_bits():
    with WorkerPool(2) as pool:
        assert pool.run(jobs.same_bits, [5, 33], 96, [torch.bfloat16], compiled=True) == [[True] * 2] * 2


def test_any_form_of_input(ranks):
    assert ranks.run(jobs.odd_forms) == [[True] * 5] * ranks.world_size


def test_a_group_that_nobody_knows_is_torch_s_to_refuse():
    with pytest.raises(RuntimeError, match="nobody knows"):
        all_reduce_in_rank_order(torch.ones(2), group="nobody knows")
