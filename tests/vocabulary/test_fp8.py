"""FP8 quantisation against a table of every code."""

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
    quantize_static_fp8,
    quantize_token_fp8,
    saturate_to_fp8,
)
from fusion_core.vocabulary.scale_layout import pack_ue8m0, unpack_ue8m0
from tests.vocabulary.code_tables import (
    KINDS,
    TABLES,
    adversarial_row,
    assert_compiles_once_for_all_token_counts,
    assert_traces_once_for_all_token_counts,
)

FORMATS = st.sampled_from([(torch.float8_e4m3fn, None), (torch.float8_e4m3fnuz, None), (torch.float8_e4m3fnuz, 224.0)])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
MIN_SCALES = st.sampled_from([None, 0.0, 1e-10, 0.5])
SMALLEST = np.float32(2.0**-126)


def codes(q: torch.Tensor) -> np.ndarray:
    return q.view(torch.uint8).numpy()


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


def expected_codes(x: np.ndarray, scale: np.ndarray, dtype: torch.dtype, fp8_max: float | None) -> np.ndarray:
    with np.errstate(all="ignore"):
        quotient = x / scale.astype(x.dtype)
    return TABLES[dtype].nearest(quotient, largest=fp8_max or math.inf)


def expected_scale(amax: np.ndarray, dtype: torch.dtype, fp8_max: float | None, min_scale: float | None) -> np.ndarray:
    largest = fp8_max or TABLES[dtype].magnitudes[-1]
    scale = amax / amax.dtype.type(largest)
    if min_scale == 0:
        return np.where(scale < SMALLEST, np.float32(1), scale.astype(np.float32))
    floor = 1 / (512 * largest) if min_scale is None else min_scale
    return np.maximum(scale, amax.dtype.type(floor)).astype(np.float32)


def expected_power(amax: float, largest: float, min_scale: float) -> float:
    """The least power of two that is not below ``max(amax / largest, min_scale)``, by trying them all."""
    for exponent in range(-126, 128):
        if math.ldexp(largest, exponent) >= amax and math.ldexp(1, exponent) >= min_scale:
            below = min_scale == 0 and math.ldexp(largest, exponent - 1) >= amax  # then it is 2**-126, with no floor
            return 1.0 if below else math.ldexp(1, exponent)
    raise AssertionError(amax)


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


@pytest.mark.parametrize(
    "quantize",
    [
        quantize_token_fp8,
        lambda x: quantize_token_fp8(x, min_scale=0),
        lambda x: quantize_group_fp8(x, group_size=64),
        lambda x: quantize_group_fp8(x, group_size=64, scale_format="ue8m0"),
    ],
)
def test_a_bad_number_does_not_leave_its_row(quantize):
    x = torch.randn(3, 64)
    clean_q, clean_scale = quantize(x)
    x[0, 5], x[1, 7] = math.nan, math.inf
    q, scale = quantize(x)
    assert scale[0].isnan().all()
    assert q[0].float().isnan().all()
    assert scale[1].isinf().all()
    assert q[1, 7].float().isnan()
    assert torch.equal(q[2].view(torch.uint8), clean_q[2].view(torch.uint8))
    assert torch.equal(scale[2], clean_scale[2])


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


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 0, 64)])
def test_any_rank_gives_the_codes_and_scales_of_its_rows(shape):
    x = torch.randn(shape)
    flat = x.reshape(-1, 64)
    for quantize in (quantize_token_fp8, lambda x: quantize_group_fp8(x, group_size=16)):
        q, scale = quantize(x)
        flat_q, flat_scale = quantize(flat)
        assert q.shape == x.shape
        assert scale.shape[:-1] == x.shape[:-1]
        assert torch.equal(q.view(torch.uint8).reshape(-1, 64), flat_q.view(torch.uint8))
        assert torch.equal(scale.reshape(flat_scale.shape), flat_scale)
        assert torch.equal(dequantize_fp8(q, scale).reshape(-1, 64), dequantize_fp8(flat_q, flat_scale))


def test_strided_input_gives_contiguous_codes_and_scales_and_stays_as_it_was():
    x = torch.randn(64, 6).t()
    before = x.clone()
    for quantize in (quantize_token_fp8, lambda x: quantize_group_fp8(x, group_size=16)):
        q, scale = quantize(x)
        assert q.is_contiguous()
        assert scale.is_contiguous()
        assert torch.equal(scale, quantize(x.contiguous())[1])
    assert torch.equal(x, before)


@given(data=st.data(), form=FORMATS)
def test_float64_and_float32_agree_to_one_code_on_the_same_numbers(data, form):
    dtype, fp8_max = form
    x = matrix(data.draw, 32).float()
    for quantize in (quantize_token_fp8, lambda x, **keywords: quantize_group_fp8(x, group_size=16, **keywords)):
        q, scale = quantize(x, dtype=dtype, fp8_max=fp8_max)
        exact_q, exact_scale = quantize(x.double(), dtype=dtype, fp8_max=fp8_max)
        assert torch.equal(scale, exact_scale)
        rank = TABLES[dtype].values().argsort(kind="stable").argsort()
        assert np.abs(rank[codes(q)] - rank[codes(exact_q)]).max(initial=0) <= 1 + (dtype == torch.float8_e4m3fn)


def test_dequantisation_reads_every_form_of_scale():
    x = torch.randn(5, 256, dtype=torch.float64)
    step = x.abs().amax() / 16  # the widest gap between codes relative to the largest, 32 / 448, with room
    static = torch.tensor(x.abs().amax().item() / 448)
    forms = [
        (quantize_static_fp8(x, static), static),
        quantize_token_fp8(x),
        quantize_group_fp8(x),
        quantize_group_fp8(x, scale_layout="column_major"),
        quantize_group_fp8(x, scale_format="ue8m0"),
        quantize_group_fp8(x, scale_format="ue8m0_packed"),
    ]
    for q, scale in forms:
        group_size = 128 if scale.dtype == torch.int32 else None
        for dtype in (torch.float32, torch.float64):
            values = dequantize_fp8(q, scale, group_size=group_size, dtype=dtype)
            assert values.dtype == dtype
            assert (values - x).abs().max() <= step


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_group_fp8(torch.ones(2, 100)), r"x.shape\[-1\] = 100, needs a multiple of group_size = 128"),
        (lambda: quantize_group_fp8(torch.ones(2, 8), group_size=0), "group_size = 0, needs 1 or more"),
        (
            lambda: quantize_group_fp8(torch.ones(2, 128), scale_format="e8m0"),
            "scale_format = 'e8m0', needs 'float32', 'ue8m0' or 'ue8m0_packed'",
        ),
        (
            lambda: quantize_group_fp8(torch.ones(2, 128), scale_layout="c"),
            "scale_layout = 'c', needs 'row_major' or 'column_major'",
        ),
        (lambda: quantize_token_fp8(torch.ones(())), r"x.shape = \[\], needs at least one dimension"),
        (lambda: quantize_token_fp8(torch.ones(3, 0)), r"x.shape\[-1\] = 0, needs at least one element"),
        (
            lambda: quantize_token_fp8(torch.ones(2, 8, dtype=torch.int32)),
            "x.dtype = torch.int32, needs float16, bfloat16, float32 or float64",
        ),
        (
            lambda: quantize_token_fp8(torch.ones(2, 8), dtype=torch.float8_e5m2),
            "dtype = torch.float8_e5m2, needs torch.float8_e4m3fn or torch.float8_e4m3fnuz",
        ),
        (
            lambda: quantize_token_fp8(torch.ones(2, 8), fp8_max=500.0),
            "fp8_max = 500.0, needs more than 0 and at most 448 for torch.float8_e4m3fn",
        ),
        (lambda: quantize_token_fp8(torch.ones(2, 8), min_scale=-1.0), "min_scale = -1.0, needs 0 or more"),
        (
            lambda: quantize_static_fp8(torch.ones(2, 8), torch.ones(2)),
            r"scale.shape = \[2\], needs one element",
        ),
        (
            lambda: quantize_static_fp8(torch.ones(2, 8), torch.ones(1, dtype=torch.float64)),
            "scale.dtype = torch.float64, needs torch.float32",
        ),
        (
            lambda: dequantize_fp8(torch.ones(2, 8), torch.ones(2, 3)),
            r"scale.shape\[-1\] = 3, needs a divisor of q.shape\[-1\] = 8",
        ),
        (
            lambda: dequantize_fp8(torch.ones(2, 8), torch.ones(2, 1, dtype=torch.int32)),
            "group_size = None, needs the number of elements per scale where scales are packed",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused_with_what_would_do(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


def every_form(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (
        quantize_static_fp8(x, scale),
        *quantize_token_fp8(x),
        *quantize_token_fp8(x, dtype=torch.float8_e4m3fnuz, min_scale=0.0),
        *quantize_group_fp8(x, group_size=16),
        *quantize_group_fp8(x, group_size=16, scale_layout="column_major"),
        *quantize_group_fp8(x, group_size=16, scale_format="ue8m0_packed"),
    )


def test_one_traced_graph_serves_every_token_count():
    assert_traces_once_for_all_token_counts(every_form, torch.randn(5, 48, dtype=torch.bfloat16), torch.tensor(0.01))


def test_one_compilation_gives_eager_s_bits_for_every_token_count():
    assert_compiles_once_for_all_token_counts(every_form, torch.randn(5, 48, dtype=torch.bfloat16), torch.tensor(0.01))
