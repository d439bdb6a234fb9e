"""Whether a fused result agrees with the unfused one, by what its dtype holds."""

from typing import Any

import torch
from torch import Tensor

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def steps(a: Tensor, b: Tensor) -> int:
    """How many codes lie between two tensors of sign-and-magnitude codes of one byte, where they differ most."""

    def number(codes: Tensor) -> Tensor:
        raw = codes.clone(memory_format=torch.contiguous_format).view(torch.uint8).to(torch.int32)
        return torch.where(raw < 128, raw, 128 - raw)

    return int((number(a) - number(b)).abs().max())


def assert_agree(fused: Any, plain: Any) -> None:
    """Codes within one step, 16-bit values and scales within what one step of a 16-bit norm changes."""
    if isinstance(plain, tuple):
        assert len(fused) == len(plain)
        for one, other in zip(fused, plain, strict=True):
            assert_agree(one, other)
        return
    assert (fused.dtype, fused.shape) == (plain.dtype, plain.shape)
    if plain.dtype in FLOAT8 or plain.dtype == torch.int32:  # int32: packed scales, byte by byte
        assert steps(fused, plain) <= 1
    elif plain.dtype == torch.uint8:  # two E2M1 codes
        for shift in (0, 4):
            one, other = ((codes >> shift & 15).to(torch.int32) for codes in (fused, plain))
            one, other = (torch.where(codes < 8, codes, 8 - codes) for codes in (one, other))
            assert (one - other).abs().max() <= 1
    elif plain.dtype == torch.float32:
        torch.testing.assert_close(fused, plain, rtol=0.02, atol=1e-9)
    else:
        torch.testing.assert_close(fused, plain, rtol=0.02, atol=0.02)


def assert_as_exact(fused: Tensor, plain: Tensor, exact: Tensor, factor: float = 1.5) -> None:
    """A fused norm's error against float64 is at most ``factor`` times the unfused one's, and one rounding."""
    rounding = torch.finfo(fused.dtype).eps * exact.abs().max()
    assert (fused - exact).abs().max() <= factor * (plain - exact).abs().max() + rounding
