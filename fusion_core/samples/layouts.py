"""Memory layouts of a tensor of one shape."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusion_core.site import Dim, TensorMeta

LAYOUTS = ("contiguous", "transposed", "sliced", "padded")
"""Row-major; the last two dimensions exchanged; every other element; a gap after each row."""


def strides(shape: tuple[Dim, ...], layout: str = "contiguous") -> tuple[int, ...]:
    """The strides of a shape in one of `LAYOUTS`; contiguous if it has fewer dimensions than the layout needs."""
    sizes = [max(int(size), 1) for size in shape]
    order = list(range(len(sizes)))
    if layout == "transposed" and len(order) > 1:
        order[-1], order[-2] = order[-2], order[-1]
    step = 2 if layout == "sliced" else 1
    result = [0] * len(sizes)
    for dim in reversed(order):
        result[dim] = step
        step *= sizes[dim]
        if layout == "padded" and dim == len(sizes) - 1:
            step += 8
    return tuple(result)


def laid_out(meta: TensorMeta, layout: str = "contiguous") -> TensorMeta:
    """The same tensor in another layout."""
    return replace(meta, stride=strides(meta.shape, layout))


def empty(meta: TensorMeta, device: torch.device | str) -> torch.Tensor:
    """A tensor of these sizes and strides. Its memory, including gaps, is NaN, or zero if the dtype has none."""
    shape = tuple(map(int, meta.shape))
    stride = strides(meta.shape) if meta.stride is None else tuple(map(int, meta.stride))
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    memory = torch.empty(extent, dtype=meta.dtype, device=device)
    if meta.dtype.is_floating_point and meta.dtype.itemsize > 1:
        memory.fill_(torch.nan)
    else:
        memory.zero_()
    return memory.as_strided(shape, stride)
