"""FP4 quantisation in plain torch: NVFP4 (blocks of 16) and MXFP4 (blocks of 32), each with its inverse.

Each function is the definition, the float64 oracle (called with float64 input) and the fallback at once. Codes are
E2M1, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with the sign in the top bit; two codes fill a byte, the
element with the lower index in the low half. Arithmetic is float32, float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fusion_core.vocabulary.fp8 import check_choice, check_one_scale, divide, prepare, saturate_to_fp8
from fusion_core.vocabulary.scale_layout import round_up, split, swizzle_128x4, unswizzle_128x4

Nvfp4ScaleLayout = Literal["swizzled_128x4", "linear"]
Mxfp4ScaleRounding = Literal["even", "floor", "up"]
Ties = Literal["even", "away"]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0


def quantize_nvfp4(
    x: Tensor, global_scale: Tensor, *, scale_layout: Nvfp4ScaleLayout = "swizzled_128x4"
) -> tuple[Tensor, Tensor]:
    """NVFP4: E2M1 codes with one E4M3 scale per 16 elements and one float32 scale for all.

    For each block ``sf = e4m3(global_scale * max|x| / 6)`` and ``q = e2m1(x * global_scale / sf)``, both to the
    nearest, ties to even, saturating; so ``x`` is about ``q * sf / global_scale``. Where ``sf`` is 0 the codes are 0.
    Source: FlashInfer ``cvt_warp_fp16_to_fp4`` (``trtllm_allreduce_fusion.cuh``), vLLM ``scaled_fp4_quant``. They
    multiply by ``1 / 6`` and by ``global_scale / sf``, so a scale or code may differ by one step at a tie.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64, ``n`` a multiple of 16.
        global_scale: A *multiplier*, usually ``448 * 6 / max|tensor|``: one float32 above 0.
        scale_layout: ``"linear"``, or ``"swizzled_128x4"`` (see `swizzle_128x4`).

    Returns:
        The codes, uint8 ``[..., n / 2]``, and the block scales, float8_e4m3fn, contiguous: ``[..., n / 16]``, or
        ``(round_up(tokens, 128), round_up(n / 16, 4))`` swizzled, padded with zeros. Both layouts are float8_e4m3fn,
        not bytes: that is what ``torch._scaled_mm`` and FlashInfer's mnnvl kernels take, and `Tensor.view` makes
        it uint8 for the others. A NaN makes its block's scale NaN; an infinity saturates.

    Raises:
        ValueError: A dtype, shape or keyword is not as above.
    """
    check_choice("scale_layout", scale_layout, get_args(Nvfp4ScaleLayout))
    check_one_scale("global_scale", global_scale)
    wide = prepare(x, 16)
    multiplier = global_scale.reshape(()).to(wide.dtype)
    blocks = split(wide, 16)
    scale = saturate_to_fp8(divide(multiplier * blocks.abs().amax(-1), E2M1_MAX), torch.float8_e4m3fn)
    divisor = scale.to(wide.dtype).unsqueeze(-1)
    packed = _pack(torch.where(divisor == 0, 0, _e2m1(blocks * multiplier / divisor)))
    if scale_layout == "swizzled_128x4":
        scale = swizzle_128x4(scale.view(-1, scale.shape[-1]))
    return packed.view(*x.shape[:-1], x.shape[-1] // 2), scale


def dequantize_nvfp4(
    packed: Tensor,
    scale: Tensor,
    global_scale: Tensor,
    *,
    scale_layout: Nvfp4ScaleLayout = "swizzled_128x4",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``q * sf / global_scale`` of `quantize_nvfp4`'s results, ``[..., n]`` in ``dtype`` (float32 or float64).

    Raises:
        ValueError: The scales do not fit ``packed``'s shape, or a keyword's value is unknown.
    """
    check_choice("scale_layout", scale_layout, get_args(Nvfp4ScaleLayout))
    check_one_scale("global_scale", global_scale)
    codes = _unpack(packed, 16)
    if scale_layout == "swizzled_128x4":
        tokens, blocks = packed.shape[:-1].numel(), codes.shape[-2]
        _check_shape(scale, [round_up(tokens, 128), round_up(blocks, 4)])
        scale = unswizzle_128x4(scale, tokens, blocks).reshape(codes.shape[:-1])
    _check_shape(scale, codes.shape[:-1])
    values = codes * scale.to(torch.float64).unsqueeze(-1) / global_scale.reshape(()).to(torch.float64)
    return values.flatten(-2).to(dtype)


def quantize_mxfp4(
    x: Tensor, *, scale_rounding: Mxfp4ScaleRounding = "even", ties: Ties = "even"
) -> tuple[Tensor, Tensor]:
    """MXFP4: E2M1 codes with one power of two per 32 elements, stored as its exponent.

    For each block ``q = e2m1(x / 2**(s - 127))``, to the nearest, saturating, with one of three rules for ``s``:

    - ``"even"``: ``s - 127 = floor(log2(r)) - 2``, ``r`` being ``max|x|`` rounded to two significant bits, ties up
      (so that 7/4 counts as 2). AITER's ``dynamic_mxfp4_quant`` with ties to even; its ``fused_ar_rms_mxfp4_quant``
      with ``ties="away"`` (``ar_mxfp4_scale_e8m0``, ``ar_mxfp4_encode`` in ``custom_all_reduce.cuh``).
    - ``"floor"``: ``s - 127 = floor(log2(max|x|)) - 2``. OCP Microscaling Formats v1.0, section 6.3.
    - ``"up"``: ``s - 127 = ceil(log2(max|x| / 6))``, the only rule with which nothing saturates. AITER's
      ``per_1x32_f4_quant``, torchao's ``RCEIL``, FlashInfer's ``mxfp4_quantize``.

    The default matches the unfused operator that AITER's fused kernel uses as its reference. ``s`` is at least 0, and 0
    for a block of zeros, whose codes are 0. A NaN or an infinity makes its block NaN: ``s = 255`` and all codes 7.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64, ``n`` a multiple of 32.
        scale_rounding: The rule for ``s``.
        ties: The rounding of a quotient half way between codes: to the ``"even"`` code or ``"away"`` from zero. Like
            AITER's kernel, ``"away"`` encodes -0.0 as 0; ``"even"`` keeps the sign.

    Returns:
        The codes, uint8 ``[..., n / 2]``, and ``s``, uint8 ``[..., n / 32]``, both contiguous.

    Raises:
        ValueError: A dtype, shape or keyword is not as above.
    """
    check_choice("scale_rounding", scale_rounding, get_args(Mxfp4ScaleRounding))
    check_choice("ties", ties, get_args(Ties))
    wide = prepare(x, 32)
    blocks = split(wide, 32)
    exponent = _mxfp4_exponent(blocks.abs().amax(-1), scale_rounding)
    codes = _e2m1(blocks * _power_of_two(127 - exponent, wide.dtype).unsqueeze(-1), ties)
    invalid = exponent == 255
    packed = _pack(torch.where(invalid.unsqueeze(-1), 7, codes))
    return packed.view(*x.shape[:-1], x.shape[-1] // 2), exponent.to(torch.uint8)


def dequantize_mxfp4(packed: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * 2**(s - 127)`` of `quantize_mxfp4`'s results, ``[..., n]`` in ``dtype``; NaN where ``s`` is 255.

    Raises:
        ValueError: The scales do not fit ``packed``'s shape.
    """
    codes = _unpack(packed, 32)
    _check_shape(scale, codes.shape[:-1])
    factor = _power_of_two(scale.to(torch.int64) - 127, torch.float64)
    factor = torch.where(scale == 255, torch.nan, factor)
    return (codes * factor.unsqueeze(-1)).flatten(-2).to(dtype)


def _e2m1(x: Tensor, ties: Ties = "even") -> Tensor:
    """The nearest E2M1 code of each value, saturating; NaN is 7 (+6), as in PTX ``cvt.rn.satfinite.e2m1x2``."""
    magnitude = x.abs()
    below = torch.zeros_like(x)
    # the midpoints between neighbouring magnitudes; ties at every second one round down to the even code
    for code, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        down = ties == "even" and code % 2 == 0
        below = below + (magnitude <= midpoint if down else magnitude < midpoint)
    negative = torch.signbit(x) & ~x.isnan() if ties == "even" else x < 0
    return torch.where(negative, 15 - below, 7 - below).to(torch.uint8)


def _pack(codes: Tensor) -> Tensor:
    low, high = split(codes, 2).unbind(-1)
    return low | high * 16


def _unpack(packed: Tensor, block: int) -> Tensor:
    """The float64 values ``[..., n / block, block]`` of packed codes."""
    n = packed.shape[-1] * 2
    if n == 0 or n % block:
        raise ValueError(f"packed.shape[-1] = {packed.shape[-1]}, needs a multiple of {block // 2}")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=packed.device)
    return split(values[codes.to(torch.int64)], block)


def _mxfp4_exponent(amax: Tensor, rounding: Mxfp4ScaleRounding) -> Tensor:
    """The biased exponent of each block's scale, an integer tensor as wide as ``amax``; 255 if that is not finite."""
    mantissa_bits, bias = _format(amax.dtype)
    # The number added to the bits carries into the exponent if the significand is 1.75 or more ("even"), above 1.5
    # ("up", since 6 is 1.5 * 4), or never ("floor").
    carry = {"even": 1 << (mantissa_bits - 2), "up": (1 << (mantissa_bits - 1)) - 1, "floor": 0}[rounding]
    bits = amax.view(torch.int64 if amax.dtype == torch.float64 else torch.int32)
    exponent = ((bits + carry) >> mantissa_bits) - (bias - 127) - 2
    return torch.where(amax.isfinite(), exponent.clamp(0, 254), 255)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2 ** exponent`` in ``dtype``, exact; the exponent's integer type is as wide as ``dtype``."""
    mantissa_bits, bias = _format(dtype)
    return ((exponent + bias) << mantissa_bits).view(dtype)


def _format(dtype: torch.dtype) -> tuple[int, int]:
    """Mantissa bits and exponent bias."""
    return (52, 1023) if dtype == torch.float64 else (23, 127)


def _check_shape(scale: Tensor, shape: Sequence[int]) -> None:
    if list(scale.shape) != list(shape):
        raise ValueError(f"scale.shape = {list(scale.shape)}, needs {list(shape)}")
