"""The codes and scales that FP8 quantisation must give, by the tables of codes."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

from tests.vocabulary.code_tables import (
    TABLES,
)

FORMATS = st.sampled_from([(torch.float8_e4m3fn, None), (torch.float8_e4m3fnuz, None), (torch.float8_e4m3fnuz, 224.0)])
MIN_SCALES = st.sampled_from([None, 0.0, 1e-10, 0.5])
SMALLEST = np.float32(2.0**-126)


def codes(q: torch.Tensor) -> np.ndarray:
    return q.view(torch.uint8).numpy()


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
