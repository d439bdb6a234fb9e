"""What is put in the place of one part: it looks alike and means something else."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.corpus.parts import HIDDEN, Parts
from tests.corpus.quantised import Quantisation, bounded, codes

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
