"""The tensors that a call gives back: their order, shapes, dtypes and strides, before anything is written."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aiter._gates import is_weak_contiguous
from aiter._memory import uninitialised, uninitialised_like
from aiter.utility.dtypes import fp8


class Fill(NamedTuple):
    """How new tensors come.

    Attributes:
        new: From a shape and a dtype.
        like: From a tensor.
    """

    new: Callable[..., Tensor]
    like: Callable[[Tensor], Tensor]


EMPTY = Fill(uninitialised, uninitialised_like)
ZEROS = Fill(lambda *shape, dtype: torch.zeros(shape, dtype=dtype), torch.zeros_like)


def plain(
    fill: Fill, inp: Tensor, w: Tensor, width: int, out: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The norm, as wide as asked, and the residual, as wide as the weight."""
    lead = inp.shape[:-1]
    if residual is None:
        residual = fill.new(*lead, w.numel(), dtype=inp.dtype)
    if out is None:
        out = fill.new(*lead, width or inp.shape[-1], dtype=inp.dtype)
    assert is_weak_contiguous(out), "output tensor is not weak-contiguous"
    return out, residual


def token_fp8(
    fill: Fill,
    inp: Tensor,
    w: Tensor,
    emits: bool,
    out: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Codes, residual, scale ``[..., 1]``, and the norm if wanted."""
    lead = inp.shape[:-1]
    if residual is None:
        residual = fill.new(*lead, w.numel(), dtype=inp.dtype)
    if out is None:
        out = fill.new(*inp.shape, dtype=fp8)
    assert is_weak_contiguous(out), "output tensor is not weak-contiguous"
    if scale is None:
        scale = fill.new(*lead, 1, dtype=torch.float32)
    return out, residual, scale, *_mirror(fill, inp, emits)


def group_fp8(fill: Fill, inp: Tensor, group_size: int, emits: bool, transposed: bool) -> tuple[Tensor, ...]:
    """Codes, residual, scales, and the norm if wanted.

    Transposed scales have a row for each entry of the input's *first* dimension, which is too few for an input of
    three.
    """
    groups = inp.shape[-1] // group_size
    if transposed:
        scale = fill.new(groups, inp.shape[0], dtype=torch.float32).transpose(0, 1)
    else:
        scale = fill.new(*inp.shape[:-1], groups, dtype=torch.float32)
    return fill.new(*inp.shape, dtype=fp8), fill.like(inp), scale, *_mirror(fill, inp, emits)


def mxfp4(fill: Fill, inp: Tensor, emits: bool) -> tuple[Tensor, ...]:
    """Packed codes, residual, exponents, and the norm if wanted."""
    lead, n = inp.shape[:-1], inp.shape[-1]
    codes, scale = fill.new(*lead, n // 2, dtype=torch.uint8), fill.new(*lead, n // 32, dtype=torch.uint8)
    return codes, fill.like(inp), scale, *_mirror(fill, inp, emits)


def _mirror(fill: Fill, inp: Tensor, emits: bool) -> list[Tensor]:
    return [fill.like(inp)] if emits else []
