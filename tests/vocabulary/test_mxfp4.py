"""MXFP4 quantisation against a table of every code, by each rule for scales and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.vocabulary.fp4 import dequantize_mxfp4, quantize_mxfp4
from tests.vocabulary.code_tables import (
    KINDS,
    adversarial_rows,
)
from tests.vocabulary.fp4_oracle import ROUNDINGS, TIES, expected_mxfp4, unpacked
from tests.vocabulary.matrices import as_numpy, matrix


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("ties", TIES)
@given(data=st.data())
def test_mxfp4_scales_and_codes_are_the_nearest(data, rounding, ties):
    x = matrix(data.draw, 64)
    packed, scale = quantize_mxfp4(x, scale_rounding=rounding, ties=ties)
    codes, scales = expected_mxfp4(as_numpy(x), rounding, ties)
    assert (packed.dtype, scale.dtype) == (torch.uint8, torch.uint8)
    np.testing.assert_array_equal(scale.numpy(), scales)
    np.testing.assert_array_equal(unpacked(packed), codes)


def test_mxfp4_even_is_bit_for_bit_what_aiter_s_kernel_computes():
    """`ar_mxfp4_scale_e8m0`, `ar_mxfp4_quant_scale` and `ar_mxfp4_encode`, restated on float32 bits."""
    x = adversarial_rows(len(KINDS) * 4, 32)
    bits = (np.abs(x).max(-1).view(np.uint32) + 0x200000) & 0xFF800000
    exponent = (bits >> 23) & 0xFF
    scales = np.where(exponent <= 2, 0, exponent - 2).astype(np.uint8)
    quotient = np.abs(x) * ((254 - scales.astype(np.uint32)) << 23).view(np.float32)[:, None]
    codes = sum((quotient >= bound).astype(np.uint8) for bound in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    codes = codes | np.where(x < 0, 8, 0).astype(np.uint8)
    packed, scale = quantize_mxfp4(torch.from_numpy(x), ties="away")
    np.testing.assert_array_equal(scale.numpy()[:, 0], scales)
    np.testing.assert_array_equal(unpacked(packed), codes)


@pytest.mark.parametrize(("rounding", "saturates"), [("even", False), ("floor", True), ("up", False)])
def test_mxfp4_rules_differ_at_the_top_of_a_block(rounding, saturates):
    amax = [4.0, 6.0, 6.5, 7.0, 7.5]
    x = torch.tensor(amax)[:, None].expand(5, 32)
    _, scale = quantize_mxfp4(x, scale_rounding=rounding)
    expected = {"even": [1, 1, 1, 2, 2], "floor": [1, 1, 1, 1, 1], "up": [1, 1, 2, 2, 2]}[rounding]
    assert torch.exp2(scale.flatten().double() - 127).tolist() == expected
    values = dequantize_mxfp4(*quantize_mxfp4(torch.full((1, 32), 7.9), scale_rounding=rounding))
    assert (values.max().item() == 6) == saturates


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("ties", TIES)
def test_mxfp4_blocks_of_zeros_infinities_and_nan(rounding, ties):
    x = torch.ones(1, 128)
    x[0, :32], x[0, 32], x[0, 64] = 0, math.inf, math.nan
    for wide in (x, x.double()):
        packed, scale = quantize_mxfp4(wide, scale_rounding=rounding, ties=ties)
        assert scale.tolist()[0][:3] == [0, 255, 255]
        assert not unpacked(packed)[0, :32].any()
        assert (unpacked(packed)[0, 32:96] == 7).all()
        values = dequantize_mxfp4(packed, scale)
        assert values[0, :32].tolist() == [0] * 32
        assert values[0, 32:96].isnan().all()
        assert values[0, 96:].tolist() == [1] * 32


def test_mxfp4_reaches_both_ends_of_float32():
    x = torch.cat([torch.full((1, 32), torch.finfo(torch.float32).max), torch.full((1, 32), 2.0**-128)], dim=-1)
    packed, scale = quantize_mxfp4(x)
    assert scale.tolist() == [[253, 0]]
    values = dequantize_mxfp4(packed, scale, dtype=torch.float64)
    assert values[0, 0].item() == 2.0**128
    assert values[0, 32].item() == 2.0**-128
