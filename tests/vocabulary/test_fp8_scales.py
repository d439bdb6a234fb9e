"""FP8 scales of tokens and groups: their values to the bit, and where they lie in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.vocabulary.fp8 import (
    dequantize_fp8,
    quantize_group_fp8,
    quantize_token_fp8,
)
from fusion_core.vocabulary.scale_layout import pack_ue8m0, unpack_ue8m0
from tests.vocabulary.code_tables import (
    TABLES,
)
from tests.vocabulary.fp8_oracle import FORMATS, MIN_SCALES, codes, expected_codes, expected_power, expected_scale
from tests.vocabulary.matrices import as_numpy, matrix


@given(data=st.data(), form=FORMATS, min_scale=MIN_SCALES)
def test_token_scales_are_exact_and_codes_the_nearest(data, form, min_scale):
    dtype, fp8_max = form
    x = matrix(data.draw, 48)
    q, scale = quantize_token_fp8(x, dtype=dtype, fp8_max=fp8_max, min_scale=min_scale)
    want = expected_scale(np.abs(as_numpy(x)).max(-1, keepdims=True), dtype, fp8_max, min_scale)
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(scale.numpy().view(np.int32), want.view(np.int32))
    np.testing.assert_array_equal(codes(q), expected_codes(as_numpy(x), want, dtype, fp8_max))


@pytest.mark.parametrize(("min_scale", "expected"), [(None, 1 / (512 * 448)), (0.0, 1.0), (1e-3, 1e-3)])
def test_a_row_of_zeros_has_the_scale_that_its_kernel_gives_it(min_scale, expected):
    q, scale = quantize_token_fp8(torch.zeros(2, 64), min_scale=min_scale)
    assert scale.tolist() == [[torch.tensor(expected).item()]] * 2
    assert not codes(q).any()


def test_the_least_scale_follows_fp8_max():
    zeros = torch.zeros(1, 8)
    for fp8_max in (224.0, 240.0):
        _, scale = quantize_token_fp8(zeros, dtype=torch.float8_e4m3fnuz, fp8_max=fp8_max)
        assert scale.item() == torch.tensor(1 / (512 * fp8_max)).item()


@given(data=st.data(), form=FORMATS, min_scale=MIN_SCALES, group=st.sampled_from([8, 16, 48]))
def test_group_scales_are_exact_and_codes_the_nearest(data, form, min_scale, group):
    dtype, fp8_max = form
    x = matrix(data.draw, 48)
    q, scale = quantize_group_fp8(x, group_size=group, dtype=dtype, fp8_max=fp8_max, min_scale=min_scale)
    grouped = as_numpy(x).reshape(-1, 48 // group, group)
    want = expected_scale(np.abs(grouped).max(-1), dtype, fp8_max, min_scale)
    assert scale.is_contiguous()
    np.testing.assert_array_equal(scale.numpy().view(np.int32), want.view(np.int32))
    np.testing.assert_array_equal(codes(q), expected_codes(grouped, want[..., None], dtype, fp8_max).reshape(-1, 48))


@given(data=st.data(), form=FORMATS, min_scale=MIN_SCALES)
def test_ue8m0_scales_are_the_least_power_of_two_that_saturates_nothing(data, form, min_scale):
    dtype, fp8_max = form
    x = matrix(data.draw, 48)
    q, scale = quantize_group_fp8(
        x, group_size=16, dtype=dtype, fp8_max=fp8_max, min_scale=min_scale, scale_format="ue8m0"
    )
    grouped = as_numpy(x).reshape(-1, 3, 16)
    largest = fp8_max or TABLES[dtype].magnitudes[-1]
    least = 1e-10 if min_scale is None else min_scale
    want = np.array(
        [[expected_power(float(np.abs(g).max()), largest, least) for g in row] for row in grouped], np.float32
    )
    np.testing.assert_array_equal(scale.numpy(), want.reshape(-1, 3))
    want = expected_codes(grouped, want.reshape(-1, 3, 1), dtype, fp8_max)
    np.testing.assert_array_equal(codes(q), want.reshape(-1, 48))


@pytest.mark.parametrize("dtype", TABLES)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_ue8m0_doubles_only_above_an_exact_power_of_two(dtype, wide):
    largest = torch.finfo(dtype).max
    exact = torch.tensor([[math.ldexp(largest, k)] for k in range(-20, 119)], dtype=wide)
    above = torch.nextafter(exact, torch.full_like(exact, math.inf))
    powers = [math.ldexp(1, k) for k in range(-20, 119)]
    for x, want in ((exact, powers), (above, [2 * power for power in powers])):
        _, scale = quantize_group_fp8(x, group_size=1, dtype=dtype, scale_format="ue8m0")
        assert scale.flatten().tolist() == want


def test_ue8m0_keeps_the_largest_numbers_finite():
    top = torch.finfo(torch.float32).max
    q, scale = quantize_group_fp8(torch.tensor([[top, -top]]), group_size=2, scale_format="ue8m0")
    assert scale.item() == 2.0**120
    assert dequantize_fp8(q, scale, dtype=torch.float64).tolist() == [[2.0**128, -(2.0**128)]]


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("groups", [1, 3, 4, 5, 8])
def test_packed_scales_lie_byte_for_byte_where_the_kernel_reads_them(tokens, groups):
    x = torch.randn(tokens, groups * 16) * torch.exp2(torch.randint(-20, 20, (tokens, 1)))
    _, scale = quantize_group_fp8(x, group_size=16, scale_format="ue8m0")
    q, packed = quantize_group_fp8(x, group_size=16, scale_format="ue8m0_packed")
    rows, columns = (tokens + 3) // 4 * 4, (groups + 3) // 4
    assert packed.dtype == torch.int32
    assert packed.shape == (tokens, columns)
    if tokens:
        assert packed.stride() == (1, rows)
    storage = np.zeros((columns, rows, 4), np.uint8)
    for token in range(tokens):
        for group in range(groups):
            exponent = math.frexp(scale[token, group].item())[1] - 1
            storage[group // 4, token, group % 4] = exponent + 127
    assert bytes(packed.untyped_storage()) == storage.tobytes()
    assert torch.equal(unpack_ue8m0(packed, groups), scale)
    assert torch.equal(dequantize_fp8(q, packed, group_size=16), dequantize_fp8(q, scale))


def test_packing_keeps_high_exponents_and_marks_nan():
    scale = torch.tensor([[2.0**127, 2.0**-126, math.nan, math.inf]])
    packed = pack_ue8m0(scale)
    assert list(packed.item().to_bytes(4, "little", signed=True)) == [254, 1, 255, 255]
    assert unpack_ue8m0(packed, 4)[0, :2].tolist() == [2.0**127, 2.0**-126]
    assert unpack_ue8m0(packed, 4)[0, 2:].isnan().all()


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (5, 16), (0, 64)])
def test_column_major_scales_are_a_transposed_view(shape):
    x = torch.randn(shape)
    q, scale = quantize_group_fp8(x, group_size=16)
    q_too, transposed = quantize_group_fp8(x, group_size=16, scale_layout="column_major")
    assert transposed.shape == scale.shape
    assert torch.equal(transposed, scale)
    assert torch.equal(q.view(torch.uint8), q_too.view(torch.uint8))
    tokens = x[..., 0].numel()
    if tokens:
        assert transposed.stride()[-1] == (tokens if len(shape) > 1 else 1)
        storage = np.frombuffer(bytes(transposed.untyped_storage()), np.float32)
        np.testing.assert_array_equal(storage, scale.reshape(tokens, -1).T.flatten().numpy())
    if len(shape) == 2 and tokens:
        assert transposed.stride() == (1, tokens)
