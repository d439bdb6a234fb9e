"""The codes and scales that FP4 quantisation must give, by the tables of codes."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

from tests.vocabulary.code_tables import (
    E2M1,
    E4M3FN,
)

GLOBAL_SCALES = st.sampled_from([1.0, 0.375, 100.3, 2688.0 / 3, 2.0**-20, 2.0**60, 1e-30, 3e38])
ROUNDINGS = ("even", "floor", "up")
TIES = ("even", "away")


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
