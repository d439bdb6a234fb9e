"""Spellings of quantisation, put together from parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.corpus.parts import Parts

SCALES: Parts = {
    "v / s": lambda v, s: v / s,
    "v * s.reciprocal()": lambda v, s: v * s.reciprocal(),
    "v * (1 / s)": lambda v, s: v * (1.0 / s),
}

CLAMPS: Parts = {
    "clamp": lambda v, most: v.clamp(-most, most),
    "clamp(min=, max=)": lambda v, most: torch.clamp(v, min=-most, max=most),
    "clamp_min, clamp_max": lambda v, most: v.clamp_min(-most).clamp_max(most),
    "maximum, minimum": lambda v, most: torch.minimum(torch.maximum(v, torch.tensor(-most)), torch.tensor(most)),
    "none": lambda v, most: v,
}

MAXIMA: Parts = {
    "abs().amax": lambda v: v.abs().amax(-1, keepdim=True),
    "abs().max().values": lambda v: v.abs().max(-1, keepdim=True).values,
    "torch.amax, unsqueezed": lambda v: torch.amax(torch.abs(v), -1).unsqueeze(-1),
}

LEASTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "clamp(min=)": lambda amax, least: amax.clamp(min=least),
    "clamp_min": lambda amax, least: amax.clamp_min(least),
    "maximum": lambda amax, least: torch.maximum(amax, torch.tensor(least)),
}

POWERS: Parts = {
    "exp2(ceil(log2))": lambda s: torch.exp2(torch.ceil(torch.log2(s))),
    "pow(2, ceil(log2))": lambda s: torch.pow(2.0, s.log2().ceil()),
}


@dataclass(frozen=True)
class Quantisation:
    """How the norm is quantised.

    Attributes:
        kind: ``"static"``, ``"token"`` or ``"group"``.
        dtype: Of the codes.
        largest: The largest magnitude.
        scaling: A part of `SCALES`.
        clamp: A part of `CLAMPS`.
        maximum: A part of `MAXIMA`, where the scale is dynamic.
        least: A part of `LEASTS` and the least maximum; None for none.
        size: Of a group.
        groups: How groups are viewed, ``"last"`` or ``"flat"``.
        power: A part of `POWERS`; None for scales that are no powers of two.
    """

    kind: str
    dtype: torch.dtype = torch.float8_e4m3fn
    largest: float = 448.0
    scaling: str = "v / s"
    clamp: str = "clamp"
    maximum: str = "abs().amax"
    least: tuple[str, float] | None = None
    size: int = 64
    groups: str = "last"
    power: str | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        """What a site of it has."""
        found: dict[str, Any] = {"fp8_dtype": self.dtype, "fp8_max": self.largest}
        if self.kind != "static":
            found["min_scale"] = self.least[1] / self.largest if self.least else 0.0
        if self.kind == "group":
            found["group_size"] = self.size
            found["scale_format"] = "ue8m0" if self.power else "float32"
        return found


def quantised(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    """The codes and, where it is dynamic, the scale."""
    wide = n.float()
    if how.kind == "static":
        return {"quantized": codes(how, wide, s)}
    shape = wide.shape
    if how.kind == "group":
        wide = wide.view(*shape[:-1], -1, how.size) if how.groups == "last" else wide.view(-1, how.size)
    scale = dynamic_scale(how, wide)
    rows = scale.view(*shape[:-1], -1) if how.kind == "group" else scale
    return {"quantized": codes(how, wide, scale).view(shape), "scale": rows}


def dynamic_scale(how: Quantisation, wide: Tensor) -> Tensor:
    """One scale for each row."""
    largest = MAXIMA[how.maximum](wide)
    if how.least:
        largest = LEASTS[how.least[0]](largest, how.least[1])
    scale = largest / how.largest
    return POWERS[how.power](scale) if how.power else scale


def codes(how: Quantisation, wide: Tensor, scale: Tensor) -> Tensor:
    """The FP8 codes of a scale."""
    return CLAMPS[how.clamp](SCALES[how.scaling](wide, scale), how.largest).to(how.dtype)


def bounded(how: Quantisation, values: Tensor) -> Tensor:
    """The FP8 codes of values that a clamp is needed for, whatever the spelling."""
    return values.clamp(-how.largest, how.largest).to(how.dtype)
