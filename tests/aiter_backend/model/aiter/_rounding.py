"""How float32 becomes something narrower in AITER's kernels, and what becomes of float32 denormals."""

import torch
from torch import Tensor

from aiter.jit.utils.chip_info import get_gfx_runtime
from aiter.utility.dtypes import fp8

TRUNCATES = get_gfx_runtime() == "gfx942"
"""Whether the kernels' cast from float32 to bfloat16 drops bits; gfx950 has an instruction, to the nearest even."""
SMALLEST_NORMAL = 2.0**-126


def flush(x: Tensor) -> Tensor:
    """Float32 with denormals as zeros of their sign: the module is built with -fgpu-flush-denormals-to-zero."""
    return torch.where(x.abs() < SMALLEST_NORMAL, x * 0, x)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``opus::cast`` of float32, which is every rounding of the kernels but `add_in`'s."""
    if dtype == torch.bfloat16 and TRUNCATES:
        return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return x.to(dtype)


def add_in(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``vec[v] += res[v]`` in ``dtype``: the compiler's own arithmetic, to the nearest even on every architecture."""
    return flush(flush(a) + flush(b)).to(dtype)


def cast_fp8(x: Tensor) -> Tensor:
    """``v_cvt_pk_fp8_f32``: to the nearest even, without saturation. Torch's cast to E4M3FN saturates."""
    if fp8 == torch.float8_e4m3fn:
        x = torch.where(x.abs() > 464, torch.nan, x)  # half way to the 480 that has no code
    return x.to(fp8)
