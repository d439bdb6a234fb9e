"""Spellings put together from parts, as a user's habits might: each part has a name, and every choice is independent.

A wrong turn exchanges one part for something else that looks alike and means something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.corpus.case import ADD, BARE, PLAIN, reduce

Parts = dict[str, Callable[..., Any]]

HIDDEN = 128
"""Of every generated place: two groups of 64, or one of 128 beside a token of its own size."""

MEANS: Parts = {
    "pow(2).mean": lambda h: h.pow(2).mean(-1, keepdim=True),
    "x * x over the last index": lambda h: (h * h).mean(h.dim() - 1, keepdim=True),
    "square over a tuple": lambda h: h.square().mean((-1,), keepdim=True),
    "sum / n": lambda h: h.pow(2).sum(-1, keepdim=True) / h.shape[-1],
    "sum * 1/n": lambda h: (h * h).sum(-1, keepdim=True) * (1.0 / HIDDEN),
    "norm() ** 2 / n": lambda h: h.norm(dim=-1, keepdim=True) ** 2 / HIDDEN,
    "vector_norm() ** 2 / n": lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True).pow(2) / HIDDEN,
    "unsqueeze": lambda h: h.pow(2).mean(-1).unsqueeze(-1),
    "[..., None]": lambda h: (h**2).mean(-1)[..., None],
    "view(..., 1)": lambda h: torch.mean(h.square(), -1).view(*h.shape[:-1], 1),
}

SHIFTS: Parts = {
    "v + eps": lambda v, eps: v + eps,
    "eps + v": lambda v, eps: eps + v,
    "torch.tensor": lambda v, eps: v + torch.tensor(eps),
    "full_like": lambda v, eps: torch.full_like(v, eps) + v,
    "v - -eps": lambda v, eps: v - -eps,
    "two parts": lambda v, eps: v + eps / 2 + eps / 2,
    "in place": lambda v, eps: (v * 1).add_(eps),
}

INVERSES: Parts = {
    "rsqrt": torch.rsqrt,
    "1 / sqrt": lambda v: 1.0 / torch.sqrt(v),
    "** -0.5": lambda v: v**-0.5,
    "sqrt().reciprocal()": lambda v: v.sqrt().reciprocal(),
    "1 / ** 0.5": lambda v: torch.pow(v, 0.5).reciprocal(),
}

NARROW_PRODUCTS: Parts = {
    "x * root": lambda x, root: x * root,
    "root * x": lambda x, root: root * x,
    "x * root.expand": lambda x, root: x * root.expand_as(x),
    "x / (1 / root)": lambda x, root: x / root.reciprocal(),
    "in place": lambda x, root: (x * 1).mul_(root),
}
"""Of x and the inverse root, where a rounding keeps the weight apart."""

PRODUCTS: Parts = {
    "(x * root) * w": lambda x, root, w: (x * root) * w,
    "x * (root * w)": lambda x, root, w: x * (root * w),
    "(w * x) * root": lambda x, root, w: (w * x) * root,
    "w * (root * x)": lambda x, root, w: w * (root * x),
    "(w * root) * x": lambda x, root, w: (w * root) * x,
    "x * w / (1 / root)": lambda x, root, w: x * w / root.reciprocal(),
}

WEIGHTS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "w": (0.0, lambda w: w),
    "w as [1, n]": (0.0, lambda w: w.unsqueeze(0)),
    "w viewed": (0.0, lambda w: w.view(1, -1).view(-1)),
    "1 + w": (1.0, lambda w: 1.0 + w),
    "w + 1": (1.0, lambda w: w + 1),
    "ones_like(w) + w": (1.0, lambda w: torch.ones_like(w) + w),
    "(w - 0.5) + 1.5": (1.0, lambda w: (w - 0.5) + 1.5),
    "1 + w as [1, n]": (1.0, lambda w: (1 + w)[None]),
    "w - 0.25": (-0.25, lambda w: w - 0.25),
}
"""The bias that a weight's spelling adds, and the spelling."""

CASTS = ("round, weigh", "weigh, round", "round, weigh in float32, round", "round, weigh in float32", "never round")

VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "none": (lambda h: h, lambda normed, h: normed),
    "flattened": (lambda h: h.reshape(-1, h.shape[-1]), lambda normed, h: normed.view(h.shape)),
    "unsqueezed": (lambda h: h.unsqueeze(0), lambda normed, h: normed.squeeze(0)),
    "cloned": (lambda h: h.clone(), lambda normed, h: normed.contiguous()),
}
"""Before the norm and behind it."""

RESIDUALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "r + a": lambda a, r: r + a,
    "a + r": lambda a, r: a + r,
    "in place": lambda a, r: r.clone().add_(a),
    "flattened": lambda a, r: (r.reshape(-1, HIDDEN) + a.reshape(-1, HIDDEN)).view(a.shape),
    "in float32, rounded": lambda a, r: (a.float() + r.float()).to(r.dtype),
    "alpha=1": lambda a, r: torch.add(a, r, alpha=1),
}
UNROUNDED = "vLLM's"
"""The norm is of the float32 sum, the residual is its rounding."""

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


@dataclass(frozen=True)
class Spelling:
    """A place in a model, part by part.

    Attributes:
        residual: A part of `RESIDUALS`, `UNROUNDED`, or None for a norm of the reduced sum itself.
        mean: A part of `MEANS`.
        shift: A part of `SHIFTS`.
        eps: Added to the mean of squares.
        inverse: A part of `INVERSES`.
        narrow: A part of `NARROW_PRODUCTS`.
        product: A part of `PRODUCTS`.
        weight: A part of `WEIGHTS`, or None for no weight.
        cast: One of `CASTS`.
        double: Computed in float64 instead of float32, where the norm is rounded at its end.
        view: A part of `VIEWS`.
        quantisation: Of the norm; None for none.
        live: The outputs that the place returns.
        dtype: Of the tensors.
        wrong: A wrong turn of `WRONG`; None for a spelling that must be found.
    """

    residual: str | None = "r + a"
    mean: str = "pow(2).mean"
    shift: str = "v + eps"
    eps: float = 1e-5
    inverse: str = "rsqrt"
    narrow: str = "x * root"
    product: str = "(x * root) * w"
    weight: str | None = "w"
    cast: str = "round, weigh"
    double: bool = False
    view: str = "none"
    quantisation: Quantisation | None = None
    live: tuple[str, ...] = ("normed",)
    dtype: torch.dtype = torch.bfloat16
    wrong: str | None = None

    @property
    def norm_pattern(self) -> str:
        """The pattern without the quantisation."""
        return PLAIN if self.residual is None else ADD

    @property
    def pattern(self) -> str:
        """The pattern that stands there, wrong turns aside."""
        return f"{self.norm_pattern}_{self.quantisation.kind}_fp8" if self.quantisation else self.norm_pattern

    @property
    def attributes(self) -> dict[str, Any]:
        """What the site has beside the usual."""
        narrow = self.dtype is not torch.float32
        wide = narrow and self.cast in ("round, weigh in float32", "never round") and self.weight is not None
        wide |= narrow and self.cast == "never round"
        return {
            "eps": self.eps,
            "weight_bias": WEIGHTS[self.weight][0] if self.weight else 0.0,
            "norm_dtype": torch.float32 if wide else None,
            "weight_after_cast": narrow and self.weight is not None and self.cast.startswith("round"),
            "norm_of_unrounded_sum": narrow and self.residual == UNROUNDED,
            **(self.quantisation.attributes if self.quantisation and self.stands == self.pattern else {}),
        }

    @property
    def stands(self) -> str:
        """The pattern that is found."""
        return WRONG[self.wrong].stands(self) if self.wrong else self.pattern

    def __call__(self, x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> dict[str, Tensor]:
        """The live outputs by name."""
        reduced = reduce(x, "max" if self.wrong == "all_reduce(max)" else "sum")
        values = {"reduced": reduced}
        wide = hidden = self._turned("reduced", reduced)
        if self.residual is not None and self.wrong in RESIDUAL_TURNS:
            wide = hidden = RESIDUAL_TURNS[self.wrong](reduced, r)
        elif self.residual == UNROUNDED:
            wide = hidden.float() + r.float()
            hidden = wide.to(x.dtype)
        elif self.residual is not None:
            wide = hidden = RESIDUALS[self.residual](hidden, r)
        values["residual_out"] = hidden
        before, behind = VIEWS[self.view]
        normed = behind(self._norm(before(self._turned("hidden", wide)), w, x.dtype), hidden)
        values["normed"] = normed
        if self.quantisation:
            values |= self._quantise(normed, s)
        return {name: values[name] for name in self.live}

    def _turned(self, where: str, value: Tensor) -> Tensor:
        turns = VALUE_TURNS[where]
        return turns[self.wrong](value) if self.wrong in turns else value

    def _norm(self, h: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        wide = h.double() if self.double else h.float()
        if self.wrong in ROOT_TURNS:
            root = ROOT_TURNS[self.wrong](wide, self.eps)
        else:
            root = INVERSES[self.inverse](SHIFTS[self.shift](MEANS[self.mean](wide), self.eps))
        if self.wrong == "minus the mean":
            wide = wide - wide.mean(-1, keepdim=True)
        product = NARROW_PRODUCTS[self.narrow]
        if self.weight is None:
            normed = product(wide, root)
            return normed if self.cast == "never round" else normed.to(dtype)
        weigh = WEIGHTS[self.weight][1]
        if self.cast in ("weigh, round", "never round"):
            normed = PRODUCTS[self.product](wide, root, weigh(w.to(wide.dtype)))
            return normed if self.cast == "never round" else normed.to(dtype)
        normed = product(wide, root).to(dtype)
        if self.cast == "round, weigh":
            return weigh(w) * normed
        normed = normed * weigh(w.float())
        return normed if self.cast == "round, weigh in float32" else normed.to(dtype)

    def _quantise(self, n: Tensor, s: Tensor) -> dict[str, Tensor]:
        assert self.quantisation is not None
        if self.wrong in QUANTISATION_TURNS:
            return QUANTISATION_TURNS[self.wrong](self.quantisation, n, s)
        return quantised(self.quantisation, n, s)


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


ROOT_TURNS: Parts = {
    "mean over another dimension": lambda h, eps: torch.rsqrt(h.square().mean(0, keepdim=True) + eps),
    "mean over a half": lambda h, eps: torch.rsqrt(h[..., : HIDDEN // 2].square().mean(-1, keepdim=True) + eps),
    "mean of |x|": lambda h, eps: torch.rsqrt(h.abs().mean(-1, keepdim=True) + eps),
    "mean of |x|^3": lambda h, eps: torch.rsqrt(h.abs().pow(3).mean(-1, keepdim=True) + eps),
    "mean of x": lambda h, eps: torch.rsqrt(h.mean(-1, keepdim=True).abs() + eps),
    "sum of squares": lambda h, eps: torch.rsqrt(h.square().sum(-1, keepdim=True) + eps),
    "sum over n - 1": lambda h, eps: torch.rsqrt(h.square().sum(-1, keepdim=True) / (HIDDEN - 1) + eps),
    "largest square": lambda h, eps: torch.rsqrt(h.square().amax(-1, keepdim=True) + eps),
    "variance": lambda h, eps: torch.rsqrt(h.var(-1, keepdim=True, correction=0) + eps),
    "eps behind the root": lambda h, eps: torch.rsqrt(h.square().mean(-1, keepdim=True)) + eps,
    "eps under the division": lambda h, eps: 1 / (torch.sqrt(h.square().mean(-1, keepdim=True)) + eps),
    "eps as a bound": lambda h, eps: torch.rsqrt(h.square().mean(-1, keepdim=True).clamp(min=0.5 + eps)),
    "root upside down": lambda h, eps: torch.sqrt(h.square().mean(-1, keepdim=True) + eps),
    "no root": lambda h, eps: torch.reciprocal(h.square().mean(-1, keepdim=True) + eps),
    "root of the root": lambda h, eps: (h.square().mean(-1, keepdim=True) + eps) ** -0.25,
    "root twice": lambda h, eps: torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * 2.0,
}
"""The inverse root, replaced."""

RESIDUAL_TURNS: Parts = {
    "alpha=2": lambda a, r: torch.add(r, a, alpha=2),
    "scaled branch": lambda a, r: r + a * 0.5,
    "scaled residual": lambda a, r: 0.5 * r + a,
    "subtracted": lambda a, r: r - a,
    "multiplied": lambda a, r: r * a,
    "broadcast residual": lambda a, r: a + r[..., :1],
    "gated": lambda a, r: r + a * torch.sigmoid(r),
    "largest of both": lambda a, r: torch.maximum(a, r),
}
"""The residual add, replaced."""

VALUE_TURNS: dict[str, Parts] = {
    "reduced": {"all_reduce(max)": lambda a: a, "activation before": lambda a: torch.relu(a)},
    "hidden": {
        "tanh before the norm": torch.tanh,
        "twice its half": lambda h: h * (1 + (torch.arange(HIDDEN, device=h.device) < HIDDEN // 2).to(h.dtype)),
        "rolled": lambda h: h.roll(1, -1),
        "clipped": lambda h: h.clamp(-1, 1),
    },
}
"""A value, made another one."""


def _int8(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    return {"quantized": (n.float() / s).round().clamp(-128, 127).to(torch.int8), "scale": s}


def _e5m2(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    return {"quantized": (n.float() / s).to(torch.float8_e5m2), "scale": s}


def _per_channel(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    scale = s.reshape(()) * torch.linspace(1, 2, HIDDEN)
    return {"quantized": codes(how, n.float(), scale), "scale": scale}


def _signed(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    scale = n.float().amax(-1, keepdim=True).clamp(min=1.0) / how.largest
    return {"quantized": bounded(how, n.float() / scale), "scale": scale}


def _over_tokens(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    scale = n.float().abs().amax(0, keepdim=True).clamp(min=0.1) / how.largest
    return {"quantized": codes(how, n.float(), scale), "scale": scale}


def _whole(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    scale = n.float().abs().max() / how.largest
    return {"quantized": codes(how, n.float(), scale), "scale": scale}


def _another_scale(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    scale = n.float().abs().amax(-1, keepdim=True) / how.largest
    return {"quantized": codes(how, n.float(), scale * 2), "scale": scale}


def _tighter_clamp(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    scale = n.float().abs().amax(-1, keepdim=True) / how.largest
    return {"quantized": (n.float() / scale).clamp(-100.0, 100.0).to(how.dtype), "scale": scale}


def _one_sided(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    return {"quantized": (n.float() / s).clamp(0.0, how.largest).to(how.dtype), "scale": s}


def _zero_point(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    return {"quantized": (n.float().abs() / s + 16.0).clamp(max=how.largest).to(how.dtype), "scale": s}


def _across(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    groups = n.float().view(*n.shape[:-1], how.size, -1)
    scale = groups.abs().amax(-2, keepdim=True) / how.largest
    return {"quantized": codes(how, groups, scale).view(n.shape), "scale": scale.squeeze(-2)}


def _of_squares(how: Quantisation, n: Tensor, s: Tensor) -> dict[str, Tensor]:
    scale = n.float().square().amax(-1, keepdim=True).clamp(min=1.0) / how.largest
    return {"quantized": bounded(how, n.float() / scale), "scale": scale}


QUANTISATION_TURNS: Parts = {
    "int8": _int8,
    "e5m2": _e5m2,
    "scale per channel": _per_channel,
    "largest value, not magnitude": _signed,
    "largest over tokens": _over_tokens,
    "largest of the tensor": _whole,
    "another scale than the one given": _another_scale,
    "clamp below the largest code": _tighter_clamp,
    "clamp on one side": _one_sided,
    "zero point": _zero_point,
    "groups across": _across,
    "square of the largest": _of_squares,
}
"""The quantisation, replaced: the norm stands."""


@dataclass(frozen=True)
class Turn:
    """A wrong turn.

    Attributes:
        stands: From the spelling, the pattern that is left.
        fits: Whether the spelling has the part that is exchanged.
    """

    stands: Callable[[Spelling], str]
    fits: Callable[[Spelling], bool] = lambda spelling: True


WRONG: dict[str | None, Turn] = {
    **{name: Turn(lambda s: BARE) for name in ROOT_TURNS},
    **{name: Turn(lambda s: BARE, lambda s: s.residual is not None) for name in RESIDUAL_TURNS},
    **{name: Turn(lambda s: BARE) for turns in VALUE_TURNS.values() for name in turns},
    "minus the mean": Turn(lambda s: BARE),
    **{name: Turn(lambda s: s.norm_pattern, lambda s: s.quantisation is not None) for name in QUANTISATION_TURNS},
}
"""Every wrong turn by name."""
