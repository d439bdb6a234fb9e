"""Matrices that break quantisers, drawn by hypothesis."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from tests.vocabulary.code_tables import (
    KINDS,
    adversarial_row,
)

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


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
