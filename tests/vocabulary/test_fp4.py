"""FP4 quantisation against a table of every code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_core.vocabulary.fp4 import dequantize_mxfp4, dequantize_nvfp4, quantize_mxfp4, quantize_nvfp4
from fusion_core.vocabulary.scale_layout import swizzle_128x4, unswizzle_128x4
from tests.vocabulary.code_tables import (
    E2M1,
    E4M3FN,
    KINDS,
    adversarial_row,
    adversarial_rows,
    assert_compiles_once_for_all_token_counts,
    assert_same,
    assert_traces_once_for_all_token_counts,
)

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
GLOBAL_SCALES = st.sampled_from([1.0, 0.375, 100.3, 2688.0 / 3, 2.0**-20, 2.0**60, 1e-30, 3e38])
ROUNDINGS = ("even", "floor", "up")
TIES = ("even", "away")


def matrix(draw, n: int) -> torch.Tensor:
    rows = draw(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32 - 1)), max_size=4))
    x = np.array([adversarial_row(kind, n, seed) for kind, seed in rows], np.float32).reshape(-1, n)
    dtype = draw(DTYPES)
    if dtype == torch.float64:  # values that float32 does not have
        return torch.from_numpy(x.astype(np.float64) * (1 + 2.0**-30))
    return torch.from_numpy(x).clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else torch.from_numpy(x).to(dtype)


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """In the dtype that the definition computes in."""
    return x.numpy() if x.dtype == torch.float64 else x.float().numpy()


def unpacked(packed: torch.Tensor) -> np.ndarray:
    """One code to a byte, low halves first."""
    return np.stack([packed.numpy() & 15, packed.numpy() >> 4], axis=-1).reshape(
        *packed.shape[:-1], 2 * packed.shape[-1]
    )


def expected_nvfp4(x: np.ndarray, global_scale: float) -> tuple[np.ndarray, np.ndarray]:
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    multiplier = x.dtype.type(np.float32(global_scale))
    with np.errstate(all="ignore"):
        scale = E4M3FN.nearest(multiplier * np.abs(blocks).max(-1) / x.dtype.type(6))
        value = E4M3FN.values()[scale].astype(x.dtype)[..., None]
        codes = np.where(value == 0, 0, E2M1.nearest(blocks * multiplier / value))
    return codes.reshape(x.shape), scale


def expected_exponent(amax: float, rounding: str) -> int:
    """The unbiased exponent of a block's scale, by trying them all."""
    if rounding == "up":
        return next(e for e in range(-127, 128) if e == 127 or math.ldexp(6, e) >= amax)
    # the scale 2**e takes the block's largest magnitude to [4, 8), or if rounded first to [3.5, 7)
    start = 4 if rounding == "floor" else 3.5
    return next(e for e in range(127, -128, -1) if e == -127 or math.ldexp(start, e) <= amax)


def expected_mxfp4(x: np.ndarray, rounding: str, ties: str) -> tuple[np.ndarray, np.ndarray]:
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    amax = np.abs(blocks).max(-1)
    exponent = np.array([expected_exponent(a, rounding) for a in amax.flatten()], np.int64).reshape(amax.shape)
    codes = E2M1.nearest(np.ldexp(blocks, -exponent[..., None]), ties=ties)
    if ties == "away":
        codes = np.where(blocks == 0, 0, codes)  # AITER's kernel drops the sign of zero
    return codes.reshape(x.shape), (exponent + 127).astype(np.uint8)


@given(data=st.data(), global_scale=GLOBAL_SCALES)
def test_nvfp4_scales_and_codes_are_the_nearest(data, global_scale):
    x = matrix(data.draw, 64)
    packed, scale = quantize_nvfp4(x, torch.tensor([global_scale]), scale_layout="linear")
    codes, scales = expected_nvfp4(as_numpy(x), global_scale)
    assert (packed.dtype, scale.dtype) == (torch.uint8, torch.float8_e4m3fn)
    np.testing.assert_array_equal(scale.view(torch.uint8).numpy(), scales)
    np.testing.assert_array_equal(unpacked(packed), codes)


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
