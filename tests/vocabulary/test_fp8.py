"""What holds of every form of FP8 quantisation: rows, strides, dtypes, the way back, refusals, traced graphs."""

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
)
from tests.vocabulary.code_tables import (
    TABLES,
    assert_compiles_once_for_all_token_counts,
    assert_traces_once_for_all_token_counts,
)
from tests.vocabulary.fp8_oracle import FORMATS, codes
from tests.vocabulary.matrices import matrix


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
