"""FP8 and MXFP4 of float32 rows, as the epilogues of AITER's fused kernels have them."""

import torch
from torch import Tensor

from aiter._rounding import cast_fp8, flush
from aiter.utility.dtypes import fp8

FP8_MAX = torch.finfo(fp8).max


def token_fp8(x: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """Codes ``[m, n]`` and scales ``[m, 1]``.

    Args:
        x: ``[m, n]``, float32.
        seen: How many elements of a row the maximum is taken over (`_norms.counted`); what lies beyond may overflow.
    """
    amax = _amax(x[:, :seen]) if seen else torch.zeros(x.shape[0], 1)  # without a whole warp the reduction gives 0
    scale = _scale(amax)
    return cast_fp8(flush(x / scale)), scale


def group_fp8(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes ``[m, n]`` and scales ``[m, n / group_size]``."""
    groups = x.unflatten(-1, (-1, group_size))
    scale = _scale(_amax(groups))
    return cast_fp8(flush(groups / scale)).flatten(-2), scale.squeeze(-1)


def mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes ``[m, n / 2]`` (low half first) and exponents ``[m, n / 32]``, both uint8.

    The exponent is that of ``amax`` rounded to two significant bits, ties up, less 2; codes go to the nearest, ties
    away from zero, without a negative zero. A NaN or an infinity has no mark: exponent 253 and code 7, a finite number.
    """
    groups = x.unflatten(-1, (-1, 32))
    bits = (_amax(groups).view(torch.int32) + 0x200000) & 0x7F800000
    exponent = (bits >> 23) - 2
    exponent = torch.where(exponent <= 0, 0, exponent)
    scaled = flush(groups * ((254 - exponent) << 23).view(torch.float32))
    magnitude = scaled.abs()
    # NaN is below none of the bounds
    code = 7 - sum((magnitude < bound).int() for bound in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    code = (code | torch.where(scaled < 0, 8, 0)).to(torch.uint8).flatten(-2)
    return code[:, 0::2] | code[:, 1::2] << 4, exponent.squeeze(-1).to(torch.uint8)


def _amax(x: Tensor) -> Tensor:
    """The largest magnitude of the last dimension, which is kept; NaN counts only where there is nothing else."""
    known = torch.where(x.isnan(), -1.0, x.abs()).amax(-1, keepdim=True)
    return torch.where(known < 0, torch.nan, known)


def _scale(amax: Tensor) -> Tensor:
    """No floor: one that would be denormal is 0, and the codes that are divided by it NaN."""
    return torch.where(amax == 0, 1.0, flush(amax / FP8_MAX))
