"""The values of a site's tensors, which workers build from a small description."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fusion_core.patterns.definition import VECTORS
from fusion_core.samples.layouts import empty
from fusion_core.samples.sites import SCALES
from fusion_core.site import Site, TensorMeta

ROWS = ("normal", "zeros", "huge", "tiny", "small", "subnormal", "spike", "inf", "-inf", "nan")
"""Kinds of rows: see `build_tensors`."""
AMAX = 6.0
"""About the largest magnitude of a norm's output, from which calibrated scales are derived."""


OWN = ("x", "y")
"""Tensors of which each rank has its own."""


@dataclass(frozen=True)
class Values:
    """The values of one example's tensors. The same object gives the same numbers in every process.

    Attributes:
        seed: The seed of the random numbers.
        rows: Kinds of rows from `ROWS`, repeated in this order.
        residual: Whether a residual's rows are of the same kinds; otherwise they are ordinary numbers.
        saturating: Whether calibrated scales are 16 times too small, so that ordinary rows saturate.
    """

    seed: int = 0
    rows: tuple[str, ...] = ("normal",)
    residual: bool = True
    saturating: bool = False


def build_tensors(
    site: Site, values: Values, rank: int, device: torch.device | str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one rank: x and y differ between ranks, all other tensors are the same on all of them.

    Rows of x are random numbers of order 1 (``normal``), zero, times 1e15 (``huge``; 1e3 in float16), times 1e-20
    (``tiny``; 1e-6 in float16), times 1e-3 (``small``), below the dtype's smallest normal number (``subnormal``), with
    a last element 1000 times as large (``spike``), or with a first element of infinity or NaN. Gaps between elements
    are NaN.

    Args:
        site: The shapes, strides and dtypes.
        values: The kinds of values.
        rank: The rank whose x it is.
        device: The device of the tensors; None for the site's type of device.
    """
    target = torch.device(site.device.type if device is None else device)
    result = {}
    for index, (name, meta) in enumerate(site.inputs.items()):
        generator = torch.Generator().manual_seed((values.seed * 64 + index) * 64 + (rank + 1 if name in OWN else 0))
        tensor = empty(meta, "cpu")
        tensor.copy_(_numbers(site, name, meta, values, generator))
        result[name] = tensor if target.type == "cpu" else _moved(tensor, meta, target)
    return result


def _moved(tensor: torch.Tensor, meta: TensorMeta, device: torch.device) -> torch.Tensor:
    moved = empty(meta, device)
    moved.copy_(tensor)
    return moved


def _numbers(site: Site, name: str, meta: TensorMeta, values: Values, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(map(int, meta.shape))
    if name in SCALES:
        factor = 16.0 if values.saturating else 1.0
        value = 448.0 * 6.0 / AMAX * factor if name == "global_scale" else AMAX / 448.0 / factor
        return torch.full(shape, value)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    if name in VECTORS:
        return vector(site, name, numbers)
    if shape and numbers.numel() and (name == "x" or values.residual):
        rows = numbers.reshape(-1, shape[-1])
        for index, row in enumerate(rows):
            _fill(row, values.rows[index % len(values.rows)], meta.dtype)
        return rows.view(shape)
    return numbers


def vector(site: Site, name: str, numbers: torch.Tensor) -> torch.Tensor:
    """The values of a bias, or of a weight that with its constant is around 1, from random numbers of order 1."""
    centre = 0.0 if name == "bias" else 1.0 - float(site.attributes.get("weight_bias", 0.0))
    return numbers * 0.5 + centre


def _fill(row: torch.Tensor, kind: str, dtype: torch.dtype) -> None:
    """Change a row of random numbers to one of a kind, in place."""
    narrow = dtype == torch.float16
    if kind == "spike":
        row[-1] *= 1e3
    elif kind in ("inf", "-inf", "nan"):
        row[0] = float(kind)
    elif kind != "normal":
        smallest = torch.finfo(dtype).smallest_normal if dtype.is_floating_point else 1.0
        row *= {
            "zeros": 0.0,
            "huge": 1e3 if narrow else 1e15,
            "tiny": 1e-6 if narrow else 1e-20,
            "small": 1e-3,
            "subnormal": smallest / 8,
        }[kind]
