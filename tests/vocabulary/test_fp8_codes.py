"""FP8 codes are the nearest, for a given scale: every code, ties, saturation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.vocabulary.fp8 import (
    dequantize_fp8,
    quantize_static_fp8,
    quantize_token_fp8,
    saturate_to_fp8,
)
from tests.vocabulary.code_tables import (
    TABLES,
)
from tests.vocabulary.fp8_oracle import FORMATS, codes, expected_codes
from tests.vocabulary.matrices import as_numpy, matrix


@pytest.mark.parametrize("dtype", TABLES)
def test_every_code_survives_a_round_trip(dtype):
    table = TABLES[dtype]
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = dequantize_fp8(every, torch.ones(()), dtype=torch.float64)
    np.testing.assert_array_equal(values.numpy(), table.values())
    for wide in (torch.float32, torch.float64):
        again = codes(saturate_to_fp8(values.to(wide), dtype))
        number = ~values.isnan().numpy()
        np.testing.assert_array_equal(again[number], np.arange(256)[number])
        assert np.isnan(table.values()[again[~number]]).all()


@pytest.mark.parametrize("dtype", TABLES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_ties_go_to_the_even_code_and_neighbours_of_ties_do_not(dtype, wide):
    magnitudes = TABLES[dtype].magnitudes
    ties = torch.from_numpy((magnitudes[:-1] + magnitudes[1:]) / 2).to(wide)
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-math.inf, math.inf)]
    x = torch.cat([ties, *beside, -ties])
    np.testing.assert_array_equal(codes(saturate_to_fp8(x, dtype)), TABLES[dtype].nearest(x.double().numpy()))


@given(x=st.lists(st.floats(), min_size=1, max_size=50), form=FORMATS)
def test_float64_is_rounded_once_whatever_its_value(x, form):
    x = torch.tensor(x, dtype=torch.float64)
    dtype, fp8_max = form
    q = saturate_to_fp8(x, dtype, fp8_max)
    assert torch.equal(q.float().isnan(), x.isnan())
    number = ~x.isnan().numpy()
    want = TABLES[dtype].nearest(x.numpy(), largest=fp8_max or math.inf)
    np.testing.assert_array_equal(codes(q)[number], want[number])


def test_float64_is_not_rounded_through_float32():
    x = torch.tensor([1 + 1 / 16 + 2.0**-40], dtype=torch.float64)  # just above a tie that goes down
    assert quantize_static_fp8(x, torch.ones(())).item() == 1.125
    assert quantize_static_fp8(x.float(), torch.ones(())).item() == 1.0


@given(data=st.data(), form=FORMATS, scale=st.floats(2.0**-100, 2.0**100, width=32))
def test_static_codes_are_the_nearest(data, form, scale):
    dtype, fp8_max = form
    x = matrix(data.draw, 32)
    q = quantize_static_fp8(x, torch.tensor([scale]), dtype=dtype, fp8_max=fp8_max)
    assert q.dtype == dtype
    np.testing.assert_array_equal(codes(q), expected_codes(as_numpy(x), np.float32(scale), dtype, fp8_max))


@pytest.mark.parametrize("dtype", TABLES)
def test_quotients_are_divided_and_not_multiplied_by_a_reciprocal(dtype):
    magnitudes = TABLES[dtype].magnitudes
    ties = (magnitudes[:-1] + magnitudes[1:]) / 2
    want = TABLES[dtype].nearest(ties)
    for scale in range(3, 200, 2):  # each x is exact, and its quotient a tie that a reciprocal may miss
        x = torch.from_numpy(np.append(ties, magnitudes[-1]) * scale).float()
        q = quantize_static_fp8(x, torch.tensor(float(scale)), dtype=dtype)
        np.testing.assert_array_equal(codes(q)[:-1], want)
        q, token_scale = quantize_token_fp8(x, dtype=dtype)
        assert token_scale.item() == scale
        np.testing.assert_array_equal(codes(q)[:-1], want)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("x_shape", [(64,), (3, 64), (2, 3, 64), (0, 64)])
def test_a_static_scale_of_any_shape_leaves_the_shape_of_x(shape, x_shape):
    x = torch.randn(x_shape)
    q = quantize_static_fp8(x, torch.full(shape, 0.5))
    assert q.shape == x.shape
    assert torch.equal(dequantize_fp8(q, torch.full(shape, 0.5)), q.float() * 0.5)


@pytest.mark.parametrize("dtype", TABLES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_static_saturates_and_keeps_nan(dtype, wide):
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, math.nan, 0.0, -0.0], dtype=wide)
    largest = torch.finfo(dtype).max
    q = quantize_static_fp8(x, torch.ones(1), dtype=dtype).double()
    assert q[:4].tolist() == [largest, -largest, largest, -largest]
    assert q[4].isnan()
    assert q[5:].tolist() == [0, 0]
