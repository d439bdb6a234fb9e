"""FP8 quantisation in plain torch: static, per token and per group, each with one dequantisation.

Each function is the definition, the float64 oracle (called with float64 input) and the fallback at once. Arithmetic is
float32, float64 for float64 input. Every scale is a float32 that a consumer multiplies by, and is rounded to float32
before it divides anything. A kernel that multiplies by a reciprocal may differ by one code at a tie.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fusion_core.vocabulary.scale_layout import column_major, pack_ue8m0, split, unpack_ue8m0

ScaleFormat = Literal["float32", "ue8m0", "ue8m0_packed"]
ScaleLayout = Literal["row_major", "column_major"]

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: kernels flush smaller ones to zero


def quantize_static_fp8(
    x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float8_e4m3fn, fp8_max: float | None = None
) -> Tensor:
    """FP8 with one scale that is known in advance: ``q = saturate(x / scale)``.

    Rounding is to the nearest code, ties to even. Magnitudes beyond ``fp8_max``, infinities included, become
    ``fp8_max``; NaN stays NaN. Source: FlashInfer ``kARResidualRMSNormFP8Quant``, vLLM ``static_scaled_fp8_quant``
    (both multiply by ``1 / scale``).

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64.
        scale: The dequantisation scale, float32 of shape ``[]``, ``[1]`` or ``[1, 1]``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``dtype`` (448, 240). vLLM uses 224 with e4m3fnuz.

    Returns:
        ``[..., n]`` of ``dtype``, contiguous.

    Raises:
        ValueError: A dtype or shape is not as above.
    """
    wide = prepare(x)
    check_one_scale("scale", scale)
    return saturate_to_fp8(wide / scale.reshape(()).to(wide.dtype), dtype, fp8_max)


def quantize_token_fp8(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    min_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """FP8 with one scale per token: ``scale = max(max|x| / fp8_max, min_scale)``, ``q = saturate(x / scale)``.

    Source: FlashInfer ``kARResidualRMSNormDynamicFP8Quant`` and vLLM ``dynamic_per_token_scaled_fp8_quant`` with the
    default ``min_scale``; AITER ``fused_ar_rms(post_per_token_quant=True)`` with ``min_scale=0``.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``dtype`` (448, 240). vLLM uses 224 with e4m3fnuz.
        min_scale: The least scale; None for ``1 / (512 * fp8_max)``. With 0 there is no least scale; one that would be
            below 2**-126, as for a row of zeros, is then 1.

    Returns:
        ``q``, ``[..., n]`` of ``dtype``, and ``scale``, float32 ``[..., 1]``, both contiguous. A NaN in a row makes
        the row's scale and codes NaN; an infinity makes its scale infinite, itself NaN and the rest of the row 0.

    Raises:
        ValueError: A dtype, shape or keyword is not as above.
    """
    wide = prepare(x)
    scale = _scale(wide.abs().amax(-1, keepdim=True), _largest(dtype, fp8_max), min_scale)
    return saturate_to_fp8(wide / scale.to(wide.dtype), dtype, fp8_max), scale


def quantize_group_fp8(
    x: Tensor,
    *,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    fp8_max: float | None = None,
    min_scale: float | None = None,
    scale_format: ScaleFormat = "float32",
    scale_layout: ScaleLayout = "row_major",
) -> tuple[Tensor, Tensor]:
    """FP8 with one scale per ``group_size`` neighbours: `quantize_token_fp8`'s rule for each group.

    With a UE8M0 format the scale is rounded up to a power of two.

    Source, and the ``min_scale`` of each: the default for vLLM's native ``QuantFP8`` and ``rms_norm_per_block_quant``
    (float32) and for FlashInfer's ``kARResidualRMSNormPerTokenGroupFP8PackedQuant`` (packed); ``eps / fp8_max`` for
    vLLM's ``per_token_group_fp8_quant``; 0 for AITER's ``fused_ar_rms_per_group_quant``.

    Args:
        x: ``[..., n]``, float16, bfloat16, float32 or float64, ``n`` a multiple of ``group_size``.
        group_size: Elements per scale.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e4m3fnuz``.
        fp8_max: The largest magnitude; None for that of ``dtype`` (448, 240). vLLM uses 224 with e4m3fnuz.
        min_scale: The least scale; None for ``1 / (512 * fp8_max)`` with float32 scales and 1e-10 with UE8M0 scales
            (before rounding up). With 0 there is no least scale; one that would be below 2**-126, as for a group of
            zeros, is then 1.
        scale_format: ``"float32"``; ``"ue8m0"``, powers of two in float32; ``"ue8m0_packed"``, their exponents, four to
            an int32 (see `pack_ue8m0`).
        scale_layout: Layout of float32 scales (packed ones have their own): ``"row_major"``, contiguous, or
            ``"column_major"`` (see `scale_layout.column_major`).

    Returns:
        ``q``, ``[..., n]`` of ``dtype``, contiguous, and ``scale``, float32 ``[..., n / group_size]`` or packed int32
        ``(tokens, ceil(n / group_size / 4))``. NaN and infinity act within their group as in `quantize_token_fp8`.

    Raises:
        ValueError: A dtype, shape or keyword is not as above.
    """
    check_choice("scale_format", scale_format, get_args(ScaleFormat))
    check_choice("scale_layout", scale_layout, get_args(ScaleLayout))
    if group_size < 1:
        raise ValueError(f"group_size = {group_size}, needs 1 or more")
    wide = prepare(x, group_size, "group_size = ")
    groups = split(wide, group_size)
    scale = _scale(groups.abs().amax(-1), _largest(dtype, fp8_max), min_scale, powers_of_two=scale_format != "float32")
    q = saturate_to_fp8(groups / scale.to(wide.dtype).unsqueeze(-1), dtype, fp8_max).view(x.shape)
    if scale_format == "ue8m0_packed":
        return q, pack_ue8m0(scale)
    return q, column_major(scale) if scale_layout == "column_major" else scale


def dequantize_fp8(
    q: Tensor, scale: Tensor, *, group_size: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``q * scale``, rounded once, for the codes and scales of every FP8 quantisation above.

    Args:
        q: ``[..., n]`` FP8 codes.
        scale: One float32 scale (``[]``, ``[1]`` or ``[1, 1]``), float32 ``[..., groups]`` of any strides with
            ``groups = 1`` for per-token scales, or the packed int32 of `pack_ue8m0`.
        group_size: Elements per scale. Required for packed scales; for float32 scales it follows from the shapes.
        dtype: Dtype of the result: ``torch.float32``, or ``torch.float64``, in which it is exact.

    Raises:
        ValueError: The scales do not fit ``q``'s shape.
    """
    values, n = q.to(torch.float64), q.shape[-1]
    if scale.dtype == torch.int32:
        if group_size is None:
            raise ValueError("group_size = None, needs the number of elements per scale where scales are packed")
        scale = unpack_ue8m0(scale, n // group_size).view(*q.shape[:-1], n // group_size)
    if scale.ndim != q.ndim or scale.shape[:-1] != q.shape[:-1]:
        check_one_scale("scale", scale)
        return (values * scale.reshape(()).to(torch.float64)).to(dtype)
    groups = scale.shape[-1]
    if n % groups or group_size not in (None, n // groups):
        needs = "a divisor of" if group_size is None else f"1 / {group_size} of"
        raise ValueError(f"scale.shape[-1] = {groups}, needs {needs} q.shape[-1] = {n}")
    values = split(values, n // groups) * scale.to(torch.float64).unsqueeze(-1)
    return values.reshape(q.shape).to(dtype)


def saturate_to_fp8(x: Tensor, dtype: torch.dtype, fp8_max: float | None = None) -> Tensor:
    """The nearest FP8 code of float32 or float64 values, ties to even, saturating; NaN stays NaN.

    Float64 is put onto the FP8 grid first: torch converts it through float32, which would round twice.
    """
    largest = _largest(dtype, fp8_max)
    x = x.clamp(-largest, largest)
    if x.dtype == torch.float64:
        grid = torch.finfo(dtype)
        step = _floor_to_power_of_two(x).clamp(min=grid.smallest_normal) * grid.eps
        x = torch.round(x / step) * step
    return x.to(dtype)


def prepare(x: Tensor, multiple: int = 1, multiple_name: str = "") -> Tensor:
    """``x`` checked, contiguous and in the dtype that is computed in: float32, or float64 for float64."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"x.dtype = {x.dtype}, needs float16, bfloat16, float32 or float64")
    if x.ndim == 0:
        raise ValueError("x.shape = [], needs at least one dimension")
    if x.shape[-1] == 0 or x.shape[-1] % multiple:
        needs = f"a multiple of {multiple_name}{multiple}" if multiple > 1 else "at least one element"
        raise ValueError(f"x.shape[-1] = {x.shape[-1]}, needs {needs}")
    return x.contiguous().to(torch.promote_types(x.dtype, torch.float32))


def check_one_scale(name: str, scale: Tensor) -> None:
    """Refuse a scale that is not one float32 number."""
    if scale.dtype != torch.float32:
        raise ValueError(f"{name}.dtype = {scale.dtype}, needs torch.float32")
    if scale.numel() != 1:
        raise ValueError(f"{name}.shape = {list(scale.shape)}, needs one element")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a keyword's value that is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} = {value!r}, needs {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}")


def divide(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor``, correctly rounded in eager mode, where CUDA multiplies by the reciprocal of a Python number.

    Inductor divides approximately on NVIDIA GPUs (unless ``TORCHINDUCTOR_EMULATE_DIVISION_ROUNDING=1``), so that the
    last bit of a compiled float32 scale may differ.
    """
    return x / x.new_full((), divisor)


def _largest(dtype: torch.dtype, fp8_max: float | None) -> float:
    if dtype not in FLOAT8:
        raise ValueError(f"dtype = {dtype}, needs {FLOAT8[0]} or {FLOAT8[1]}")
    largest = torch.finfo(dtype).max
    if fp8_max is None:
        return largest
    if not 0 < fp8_max <= largest:
        raise ValueError(f"fp8_max = {fp8_max}, needs more than 0 and at most {largest:g} for {dtype}")
    return fp8_max


def _scale(amax: Tensor, largest: float, min_scale: float | None, *, powers_of_two: bool = False) -> Tensor:
    """The float32 scale of each maximum: ``amax / largest``, bounded below, rounded up to a power of two if asked."""
    if min_scale is None:
        min_scale = 1e-10 if powers_of_two else 1 / (512 * largest)
    if min_scale < 0:
        raise ValueError(f"min_scale = {min_scale}, needs 0 or more")
    least = max(min_scale, SMALLEST_SCALE)
    if powers_of_two:
        # By comparison: a division that is compiled for a GPU is approximate and might double an exact power of two.
        mantissa, exponent = math.frexp(largest)
        below = _floor_to_power_of_two(amax)
        scale = below * 2.0 ** (1 - exponent)
        scale = torch.where(amax > below * (2 * mantissa), scale * 2, scale)
        scale = torch.where(amax.isnan(), amax, scale)
        mantissa, exponent = math.frexp(least)
        least = 2.0 ** (exponent - (mantissa == 0.5))
    else:
        scale = divide(amax, largest)
    scale = scale.clamp(min=least) if min_scale else torch.where(scale < least, 1.0, scale)
    return scale.to(torch.float32)


def _floor_to_power_of_two(x: Tensor) -> Tensor:
    """The largest power of two not above ``|x|``: 0 for subnormal numbers, infinity for infinity and NaN."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)
