import math

import pytest
import torch

from fusion_core.bench import outputs

ONES = torch.ones(2, 3)
INF, NAN = math.inf, math.nan


def row(*values):
    return [torch.tensor([*map(float, values)])]


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (row(4, 2), row(4, 3), 0.25),
        (row(4, 2), row(4, 2), 0.0),
        (row(0, 0), row(0, 0), 0.0),
        (row(0, 0), row(0, 1), INF),
        (row(-4, 2), row(4, 2), 2.0),
        ([*row(1, 2), *row(1e6, 1e6)], [*row(2, 2), *row(1e6, 1e6)], 0.5),  # a large tensor does not hide a small one
        (row(4, -INF), row(3, -INF), 0.25),  # a mask
        (row(4, -INF), row(4, INF), INF),
        (row(4, -INF), row(4, 0), INF),
        (row(4, 0), row(4, INF), INF),
        (row(4, 0), row(4, NAN), INF),
        (row(NAN, NAN), row(NAN, NAN), INF),
        (row(1), row(1, 1), INF),
        (row(1), [*row(1), *row(1)], INF),
        (row(), row(), 0.0),
        ([], [], None),
    ],
)
def test_difference(one, other, found):
    assert outputs.difference(one, other) == found


def test_float64_is_compared_in_float64():
    one = torch.ones(1, dtype=torch.float64)
    assert outputs.difference([one], [one + 1e-12]) == pytest.approx(1e-12, rel=1e-3)


def test_what_is_kept_is_a_copy_of_floating_point_tensors_wherever_they_are():
    result = {"a": [ONES, torch.arange(3)], "b": (ONES.half(), "text", None)}
    found = outputs.kept(result)
    assert [tensor.dtype for tensor in found] == [torch.float32, torch.float16]
    assert found[0].data_ptr() != ONES.data_ptr()


@pytest.mark.usefixtures("one_rank")
def test_of_a_tensor_that_is_split_the_share_is_kept():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    whole = DTensor.from_local(ONES, DeviceMesh("cpu", [0]), [Shard(0)])
    (found,) = outputs.kept([whole])
    assert type(found) is torch.Tensor
    assert torch.equal(found, ONES)


@pytest.mark.parametrize(
    ("dtypes", "limit"),
    [
        ([torch.float32, torch.bfloat16, torch.int64], 0.1),
        ([torch.float8_e4m3fn, torch.float32], 0.1),
        ([torch.float16, torch.float32], 0.05),
        ([torch.float32], 1e-3),
        ([torch.float64], 1e-6),
        ([torch.int64], 0.1),
    ],
)
def test_the_narrowest_dtype_sets_the_limit(dtypes, limit):
    assert outputs.limit(dtypes) == limit
