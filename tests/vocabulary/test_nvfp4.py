"""NVFP4 quantisation against a table of every code, and its scales as the kernel reads them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.vocabulary.fp4 import dequantize_nvfp4, quantize_nvfp4
from fusion_core.vocabulary.scale_layout import swizzle_128x4, unswizzle_128x4
from tests.vocabulary.code_tables import (
    E2M1,
    E4M3FN,
)
from tests.vocabulary.fp4_oracle import GLOBAL_SCALES, expected_nvfp4, unpacked
from tests.vocabulary.matrices import as_numpy, matrix


@given(data=st.data(), global_scale=GLOBAL_SCALES)
def test_nvfp4_scales_and_codes_are_the_nearest(data, global_scale):
    x = matrix(data.draw, 64)
    packed, scale = quantize_nvfp4(x, torch.tensor([global_scale]), scale_layout="linear")
    codes, scales = expected_nvfp4(as_numpy(x), global_scale)
    assert (packed.dtype, scale.dtype) == (torch.uint8, torch.float8_e4m3fn)
    np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), scales)
    np.testing.assert_array_equal(unpacked(packed), codes)


def test_nvfp4_quotients_are_divided_and_not_multiplied_by_a_reciprocal():
    ties = (E2M1.magnitudes[:-1] + E2M1.magnitudes[1:]) / 2
    row = np.concatenate([ties, -ties, [6, 6]])
    for scale in E4M3FN.magnitudes[8:]:  # each x is exact, and its quotient a tie that a reciprocal may miss
        packed, block_scale = quantize_nvfp4(
            torch.from_numpy(row * scale).float(), torch.ones(1), scale_layout="linear"
        )
        assert block_scale.item() == scale
        np.testing.assert_array_equal(unpacked(packed), E2M1.nearest(row))


def test_blocks_too_small_for_a_scale_are_zeros_and_not_nan():
    x = torch.tensor([[0.0] * 16 + [-0.0] * 16 + [2.0**-12, -(2.0**-12)] * 8 + [1.0] * 16])
    packed, scale = quantize_nvfp4(x, torch.ones(1), scale_layout="linear")
    assert scale.float().tolist()[0][:3] == [0, 0, 0]
    assert not unpacked(packed)[0, :48].any()
    values = dequantize_nvfp4(packed, scale, torch.ones(1), scale_layout="linear")
    assert values[0, :48].tolist() == [0] * 48
    assert not values.isnan().any()


def test_nvfp4_saturates_and_marks_only_the_block_of_a_nan():
    x = torch.ones(1, 64)
    x[0, 0], x[0, 16], x[0, 32] = math.inf, -math.nan, 1e30
    packed, scale = quantize_nvfp4(x, torch.ones(()), scale_layout="linear")
    values = dequantize_nvfp4(packed, scale, torch.ones(()), scale_layout="linear")
    assert values[0, [0, 32]].tolist() == [6 * 448, 6 * 448]
    assert values[0, 16:32].isnan().all()
    assert unpacked(packed)[0, 16] == 7
    assert torch.allclose(values[0, 48:], torch.ones(16), rtol=0.07)


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 300])
@pytest.mark.parametrize("blocks", [1, 3, 4, 6])
def test_swizzled_scales_lie_byte_for_byte_where_the_kernel_reads_them(tokens, blocks):
    x = torch.randn(tokens, blocks * 16)
    packed, linear = quantize_nvfp4(x, torch.ones(()), scale_layout="linear")
    packed_too, swizzled = quantize_nvfp4(x, torch.ones(()))
    rows, columns = -(-tokens // 128) * 128, -(-blocks // 4) * 4
    assert swizzled.dtype == torch.float8_e4m3fn
    assert swizzled.shape == (rows, columns)
    assert swizzled.is_contiguous()
    storage = np.zeros(rows * columns, np.uint8)
    for m in range(tokens):
        for k in range(blocks):
            tile = (m // 128) * (columns // 4) + k // 4
            storage[tile * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4] = linear.view(torch.uint8)[m, k]
    np.testing.assert_array_equal(swizzled.view(torch.uint8).numpy().flatten(), storage)
    assert torch.equal(packed, packed_too)
    values = dequantize_nvfp4(packed, swizzled, torch.ones(()))
    assert torch.equal(values, dequantize_nvfp4(packed, linear, torch.ones(()), scale_layout="linear"))


@pytest.mark.parametrize("tokens", [0, 1, 128, 200])
def test_unswizzling_gives_back_any_byte(tokens):
    scale = torch.randint(0, 256, (tokens, 7), dtype=torch.uint8)
    assert torch.equal(unswizzle_128x4(swizzle_128x4(scale), tokens, 7), scale)
