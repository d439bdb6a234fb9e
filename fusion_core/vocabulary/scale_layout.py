"""Memory layouts of block scales that matrix multiplications require, with their inverses.

Every function is plain torch without data-dependent control flow, and accepts zero tokens and symbolic token counts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``, which may be symbolic."""
    return (value + multiple - 1) // multiple * multiple


def split(x: Tensor, size: int) -> Tensor:
    """``[..., n]`` as ``[..., n / size, size]``."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def pad_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix extended with zeros until its sizes are multiples of ``rows`` and ``columns``."""
    # Add the most that can be missing, then cut: a tracer would specialise on a size that may be 0 or 1. Not
    # torch.nn.functional.pad, which needs the Python dispatcher if it is traced with symbolic sizes.
    height, width = x.shape
    x = torch.cat((x, x.new_zeros(height, columns - 1)), dim=1)[:, : round_up(width, columns)]
    return torch.cat((x, x.new_zeros(rows - 1, x.shape[1])), dim=0)[: round_up(height, rows)]


def column_major(scale: Tensor) -> Tensor:
    """The same ``[..., groups]`` scales in column-major order.

    Flattened to ``(tokens, groups)`` the result has strides ``(1, tokens)``: the transposed view of a contiguous
    ``(groups, tokens)`` tensor. Source: vLLM ``QuantFP8(column_major_scales=True)``, AITER ``transpose_scale=True``.
    """
    flat = scale.reshape(-1, scale.shape[-1])
    # clone, not a view: contiguous() and view() would leave the strides (groups, 1) if there is one token
    result = flat.t().clone(memory_format=torch.contiguous_format).t()
    return result if scale.ndim == 2 else result.view(scale.shape)


def pack_ue8m0(scale: Tensor) -> Tensor:
    """Four exponents to an int32, from float32 scales ``[..., groups]`` that are powers of two.

    Byte ``j % 4`` (lowest first) of ``packed[t, j // 4]`` is the exponent field of ``scale[t, j]``, that is
    ``log2(scale) + 127``, or 255 for NaN and infinity.
    Source: FlashInfer ``trtllm_allreduce_fusion.cuh``, ``write_group_scale``; DeepGEMM's TMA-aligned scales.

    Returns:
        int32 ``(tokens, ceil(groups / 4))``, all leading dimensions flattened, with strides
        ``(1, round_up(tokens, 4))``. The unused bytes and the storage between columns are zero.
    """
    flat = scale.reshape(-1, scale.shape[-1])
    exponents = (flat.view(torch.int32) >> 23) & 0xFF
    exponents = pad_to_multiple(exponents, 4, 4)
    first, second, third, fourth = split(exponents, 4).unbind(-1)
    packed: Tensor = first | second << 8 | third << 16 | fourth << 24
    return packed.t().clone(memory_format=torch.contiguous_format).t()[: flat.shape[0]]


def unpack_ue8m0(packed: Tensor, groups: int) -> Tensor:
    """The float32 scales ``(tokens, groups)`` of `pack_ue8m0`'s result; 255 is NaN."""
    exponents = torch.stack([(packed >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1).flatten(-2)[..., :groups]
    return torch.where(exponents == 255, torch.nan, (exponents << 23).view(torch.float32))


def swizzle_128x4(scale: Tensor) -> Tensor:
    """One-byte scales ``(tokens, blocks)`` in the order in which Blackwell's block-scaled multiplications read them.

    Tiles of 128 tokens by 4 blocks, 512 bytes each, are stored row by row. With ``T = ceil(blocks / 4)`` the scale of
    token ``m`` and block ``k`` is at byte
    ``(m // 128 * T + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4``.
    Source: cuBLAS documentation, "1D Block Scaling Factors Layout"; FlashInfer ``get_sf_out_offset_128x4``
    (``trtllm_allreduce_fusion.cuh``); the same as torch's ``common_quantized.to_blocked``.

    Returns:
        ``(round_up(tokens, 128), round_up(blocks, 4))`` in ``scale``'s dtype, contiguous; the padding is zero.
    """
    tokens, blocks = scale.shape
    rows, columns = round_up(tokens, 128), round_up(blocks, 4)
    # as bytes: concatenation is not implemented for every one-byte float dtype
    padded = pad_to_multiple(scale.view(torch.uint8), 128, 4)
    # gathered, not permuted: a dimension of rows // 128 may be 1, and a tracer would specialise on it
    byte = torch.arange(rows * columns, device=scale.device)
    tile = byte // 512
    token = tile // (columns // 4) * 128 + byte % 16 // 4 * 32 + byte % 512 // 16
    block = tile % (columns // 4) * 4 + byte % 4
    return padded[token, block].view(rows, columns).view(scale.dtype)


def unswizzle_128x4(swizzled: Tensor, tokens: int, blocks: int) -> Tensor:
    """The inverse of `swizzle_128x4`: the scales ``(tokens, blocks)``, without the padding."""
    rows, columns = swizzled.shape
    tiles = swizzled.view(torch.uint8).view(rows // 128, columns // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns)[:tokens, :blocks].view(swizzled.dtype)
