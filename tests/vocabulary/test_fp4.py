"""What holds of both forms of FP4 quantisation: ties, rows, strides, dtypes, the way back, refusals, traced graphs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.vocabulary.fp4 import dequantize_mxfp4, dequantize_nvfp4, quantize_mxfp4, quantize_nvfp4
from tests.vocabulary.code_tables import (
    E2M1,
    assert_compiles_once_for_all_token_counts,
    assert_same,
    assert_traces_once_for_all_token_counts,
)
from tests.vocabulary.fp4_oracle import TIES, unpacked
from tests.vocabulary.matrices import matrix


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_ties_between_fp4_codes_go_where_they_are_told(wide):
    midpoints = (E2M1.magnitudes[:-1] + E2M1.magnitudes[1:]) / 2
    ties = torch.from_numpy(np.concatenate([midpoints, -midpoints, [6.0, -6.0]])).to(wide)
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-math.inf, math.inf)]
    x = torch.cat([ties, beside[0].clamp(-6, 6), beside[1].clamp(-6, 6)]).view(3, 16)
    even = E2M1.nearest(x.double().numpy())
    away = E2M1.nearest(x.double().numpy(), ties="away")
    assert (even != away).any()
    packed, scale = quantize_nvfp4(x, torch.ones(()), scale_layout="linear")
    assert (scale.float() == 1).all()
    np.testing.assert_array_equal(unpacked(packed), even)
    x = torch.cat([x, x], dim=-1)
    for ties, want in (("even", even), ("away", away)):
        packed, scale = quantize_mxfp4(x, ties=ties)
        assert (scale == 127).all()
        np.testing.assert_array_equal(unpacked(packed), np.concatenate([want, want], axis=-1))


def test_float64_is_not_rounded_through_float32():
    x = torch.full((1, 32), 6.0, dtype=torch.float64)
    x[0, 1] = 0.25 + 2.0**-40  # just above a tie that goes down
    assert unpacked(quantize_mxfp4(x)[0])[0, 1] == 1
    assert unpacked(quantize_nvfp4(x, torch.ones(()))[0])[0, 1] == 1
    x[0] = 7 - 2.0**-40  # just below where the "even" scale doubles
    assert quantize_mxfp4(x)[1].tolist() == [[127]]
    assert quantize_mxfp4(x.float())[1].tolist() == [[128]]


@given(data=st.data())
def test_float64_and_float32_agree_to_one_code_on_the_same_numbers(data):
    x = matrix(data.draw, 64).float()
    for ties in TIES:
        assert_same(quantize_mxfp4(x, ties=ties), quantize_mxfp4(x.double(), ties=ties))  # powers of two are exact
    packed, scale = quantize_nvfp4(x, torch.ones(()), scale_layout="linear")
    exact, exact_scale = quantize_nvfp4(x.double(), torch.ones(()), scale_layout="linear")
    steps = scale.view(torch.uint8).int() - exact_scale.view(torch.uint8).int()
    assert not steps.numel() or steps.abs().max() <= 1
    same = (steps == 0).numpy().repeat(16, axis=-1)
    assert np.abs((unpacked(packed) & 7).astype(int) - (unpacked(exact) & 7))[same].max(initial=0) <= 1


@pytest.mark.parametrize("code", range(16))
def test_every_code_comes_back_from_either_half_of_a_byte(code):
    value = E2M1.values()[code]
    for low, high in ((code, 0), (0, code)):
        packed = torch.full((1, 16), low | high << 4, dtype=torch.uint8)
        ones = torch.ones(1, 2).to(torch.float8_e4m3fn)
        for values in (
            dequantize_nvfp4(packed, ones, torch.tensor(0.5), scale_layout="linear") / 2,
            dequantize_mxfp4(packed, torch.tensor([[127]], dtype=torch.uint8)),
        ):
            assert values[0, 0::2].tolist() == [value if low else 0.0] * 16
            assert values[0, 1::2].tolist() == [value if high else 0.0] * 16


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 0, 64)])
def test_any_rank_gives_the_codes_and_scales_of_its_rows(shape):
    x = torch.randn(shape, dtype=torch.float64)
    flat = x.reshape(-1, 64)
    one = torch.tensor([[2.0]])
    packed, scale = quantize_nvfp4(x, one)
    assert packed.shape == (*shape[:-1], 32)
    flat_packed, flat_scale = quantize_nvfp4(flat, one)
    assert_same((packed.view(-1, 32), scale), (flat_packed, flat_scale))
    _, linear = quantize_nvfp4(x, one, scale_layout="linear")
    assert linear.shape == (*shape[:-1], 4)
    values = dequantize_nvfp4(packed, scale, one, dtype=torch.float64)
    assert values.shape == x.shape
    assert torch.equal(values, dequantize_nvfp4(packed, linear, one, scale_layout="linear", dtype=torch.float64))
    packed, scale = quantize_mxfp4(x)
    assert packed.shape == (*shape[:-1], 32)
    assert scale.shape == (*shape[:-1], 2)
    assert_same((packed.view(-1, 32), scale.view(-1, 2)), quantize_mxfp4(flat))
    assert dequantize_mxfp4(packed, scale).shape == x.shape


def test_values_come_back_to_within_half_a_step():
    x = torch.randn(20, 64, dtype=torch.float64)
    global_scale = torch.tensor(448 * 6 / x.abs().max().item())
    near = dequantize_nvfp4(*quantize_nvfp4(x, global_scale), global_scale, dtype=torch.float64)
    amax = x.view(20, 4, 16).abs().amax(-1, keepdim=True).expand(20, 4, 16).reshape(20, 64)
    assert ((near - x).abs() <= amax * (1 / 6 + 1 / 16)).all()  # half the widest gap, and the scale's own rounding
    near = dequantize_mxfp4(*quantize_mxfp4(x, scale_rounding="up"), dtype=torch.float64)
    amax = x.view(20, 2, 32).abs().amax(-1, keepdim=True).expand(20, 2, 32).reshape(20, 64)
    assert ((near - x).abs() <= amax / 3).all()


def test_strided_input_gives_contiguous_codes_and_scales_and_stays_as_it_was():
    x = torch.randn(64, 6).t()
    before = x.clone()
    for quantize in (quantize_mxfp4, lambda x: quantize_nvfp4(x, torch.ones(1), scale_layout="linear")):
        assert all(result.is_contiguous() for result in quantize(x))
        assert_same(quantize(x), quantize(x.contiguous()))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_nvfp4(torch.ones(2, 24), torch.ones(1)), r"x.shape\[-1\] = 24, needs a multiple of 16"),
        (lambda: quantize_mxfp4(torch.ones(2, 48)), r"x.shape\[-1\] = 48, needs a multiple of 32"),
        (lambda: quantize_mxfp4(torch.ones(2, 0)), r"x.shape\[-1\] = 0, needs a multiple of 32"),
        (lambda: quantize_mxfp4(torch.ones(())), r"x.shape = \[\], needs at least one dimension"),
        (
            lambda: quantize_mxfp4(torch.ones(2, 32, dtype=torch.int8)),
            "x.dtype = torch.int8, needs float16, bfloat16, float32 or float64",
        ),
        (
            lambda: quantize_mxfp4(torch.ones(2, 32), scale_rounding="ceil"),
            "scale_rounding = 'ceil', needs 'even', 'floor' or 'up'",
        ),
        (lambda: quantize_mxfp4(torch.ones(2, 32), ties="odd"), "ties = 'odd', needs 'even' or 'away'"),
        (
            lambda: quantize_nvfp4(torch.ones(2, 32), torch.ones(1), scale_layout="8x4"),
            "scale_layout = '8x4', needs 'swizzled_128x4' or 'linear'",
        ),
        (
            lambda: quantize_nvfp4(torch.ones(2, 32), torch.ones(3)),
            r"global_scale.shape = \[3\], needs one element",
        ),
        (
            lambda: quantize_nvfp4(torch.ones(2, 32), torch.ones(1, dtype=torch.bfloat16)),
            "global_scale.dtype = torch.bfloat16, needs torch.float32",
        ),
        (
            lambda: dequantize_mxfp4(torch.ones(2, 24, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.uint8)),
            r"packed.shape\[-1\] = 24, needs a multiple of 16",
        ),
        (
            lambda: dequantize_mxfp4(torch.ones(2, 32, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.uint8)),
            r"scale.shape = \[2, 1\], needs \[2, 2\]",
        ),
        (
            lambda: dequantize_nvfp4(torch.ones(200, 32, dtype=torch.uint8), torch.ones(128, 4), torch.ones(1)),
            r"scale.shape = \[128, 4\], needs \[256, 4\]",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_what_would_do(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


def every_form(x: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (
        *quantize_nvfp4(x, global_scale),
        *quantize_mxfp4(x),
    )


def test_one_traced_graph_serves_every_token_count():
    assert_traces_once_for_all_token_counts(every_form, torch.randn(5, 64, dtype=torch.bfloat16), torch.tensor(100.3))


def test_one_compilation_gives_eager_s_bits_for_every_token_count():
    assert_compiles_once_for_all_token_counts(every_form, torch.randn(5, 64, dtype=torch.bfloat16), torch.tensor(100.3))
