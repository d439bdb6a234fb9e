"""Parts that a spelling of a norm is put together from, as a user's habits might: each part has a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
