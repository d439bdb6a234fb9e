"""Spellings of the LayerNorm behind ``residual + all_reduce(x)`` or the all_reduce itself, and of a bias alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.corpus.case import (
    ADD_LAYER,
    AFTER,
    BIAS,
    BOTH,
    EPS,
    LAYER,
    NORMED,
    REDUCED,
    Case,
    Given,
    N,
    layer_norm,
    norm,
    reduce,
)
from tests.support.device import DEVICE


def _bias() -> Tensor:
    return torch.linspace(-1, 1, N)


WITH_BIAS = Given(more=(lambda: _bias().bfloat16(),))
FLOAT = Given(dtype=torch.float32, more=(_bias,))
HALF = Given(dtype=torch.float16, more=(lambda: _bias().half(),))
FLOAT_BIAS = Given(more=(_bias,))
STREAM = Given(residual=torch.float32, more=(lambda: _bias().bfloat16(),))
ONE_TOKEN = Given(shape=(1, 1, N), more=(lambda: _bias().bfloat16(),))
TAKEN_APART = {"reassociated": True}
SUM = {"sum"}


def row(
    name: str,
    spelling: Callable[[Tensor, Tensor, Tensor], Any],
    *,
    given: Given = WITH_BIAS,
    weight: bool = True,
    bias: bool = False,
    dynamic: bool = False,
    **differing: Any,
) -> Case:
    """A spelling of ``layer_norm(h, w, b)`` behind the residual add."""

    def model(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
        total = r + reduce(x)
        return spelling(total, w, b), total

    return Case(name, model, ADD_LAYER, BOTH, differing, given, weight=weight, bias=bias, dynamic=dynamic)


def by(
    mean: Callable[[Tensor], Tensor] = lambda h: h.mean(-1, keepdim=True),
    variance: Callable[[Tensor, Tensor], Tensor] = lambda h, c: c.pow(2).mean(-1, keepdim=True),
    product: Callable[[Tensor, Tensor], Tensor] = lambda c, v: c * torch.rsqrt(v + EPS),
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The norm without bias in float32, with a mean, a variance and a quotient of one's own."""

    def spelling(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        wide = h.float()
        centred = wide - mean(wide)
        return (product(centred, variance(wide, centred)) * w.float()).to(h.dtype)

    return spelling


def cohere(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """As Hugging Face's Cohere writes it."""
    dtype, h = h.dtype, h.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + EPS)
    return (w.to(torch.float32) * h).to(dtype)


def mean_first(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """The difference the other way round, and the sign taken back."""
    wide = h.float()
    centred = wide.mean(-1, keepdim=True) - wide
    return (-centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS) * w).to(h.dtype)


def dropped(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    wide = h.float()
    centred = wide - wide.mean(-1)[..., None]
    return (centred / torch.sqrt((centred * centred).mean(-1).unsqueeze(-1) + EPS)).to(h.dtype) * w


def flattened(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return layer_norm(h.view(-1, N), w, b).view(h.shape)


def by_var_mean(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(h.float(), -1, correction=0, keepdim=True)
    return (w * (h.float() - mean) * torch.rsqrt(variance + EPS) + b).to(h.dtype)


def without_casts(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = h - h.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * w + b


def rounded(h: Tensor) -> Tensor:
    return layer_norm(h, None)


def unrounded(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    """The norm of the float32 sum whose rounded form is the next residual."""
    wide = reduce(x).float() + r.float()
    return layer_norm(wide, w.float(), b.float()).to(x.dtype), wide.to(x.dtype)


def the_norm_is_the_next_residual(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    """BLOOM's other form. Of one token, the sum with it has the shape of a sum with a bias."""
    total = layer_norm(r + reduce(x), w) + reduce(r)
    return layer_norm(total, w, b), total


def parallel(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Any:
    """Phi's attention and MLP, each with a bias, and the residual."""
    total = (reduce(x) + w) + (reduce(r) + b) + r
    return layer_norm(total, w, b), total


def bias_in_place(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = reduce(x)
    total += w
    return total


def bias_in_place_with_other_strides(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """`all_reduce` into a transposed tensor, whose strides the sum then has."""
    total = x.transpose(0, 1).contiguous().transpose(0, 1) * 1
    dist.all_reduce(total)
    return total + w, total


with_both = torch.nn.LayerNorm(N, EPS, dtype=torch.bfloat16, device=DEVICE).requires_grad_(False)
with_both.weight.copy_(Given()()[2])
with_both.bias.copy_(_bias())

CASES = [
    # torch's own
    row("F.layer_norm", layer_norm, bias=True),
    row("F.layer_norm without bias", lambda h, w, b: layer_norm(h, w)),
    row("F.layer_norm without weight", lambda h, w, b: layer_norm(h, None), weight=False),
    row("F.layer_norm with a bias alone", lambda h, w, b: layer_norm(h, None, b), weight=False, bias=True),
    row("F.layer_norm in float32", layer_norm, given=FLOAT, bias=True),
    row("F.layer_norm in float16", layer_norm, given=HALF, bias=True),
    row("F.layer_norm of symbolic sizes", layer_norm, dynamic=True, bias=True),
    row("F.layer_norm of a wider tensor", lambda h, w, b: layer_norm(h.float(), w.float(), b.float()).to(h.dtype), bias=True),
    row("F.layer_norm, any epsilon", lambda h, w, b: layer_norm(h, w, b, 0.03), bias=True, eps=0.03),
    row("nn.LayerNorm", lambda h, w, b: with_both(h), bias=True),
    # what models really write
    row("Cohere", cohere),
    row("Cohere of symbolic sizes", cohere, dynamic=True),
    row("Nemotron", lambda h, w, b: layer_norm(h, w + 1, b), bias=True, weight_bias=1.0),
    row("OLMo", lambda h, w, b: layer_norm(h.float(), None).to(h.dtype), weight=False),
    # the mean
    row("sum / n", by(mean=lambda h: h.sum(-1, keepdim=True) / N)),
    row("the mean over a tuple", by(mean=lambda h: h.mean((-1,), keepdim=True))),
    row("the mean by expand", by(mean=lambda h: h.mean(-1, keepdim=True).expand_as(h))),
    row("mean - x", mean_first),
    row("dropped dimensions", dropped, **AFTER),
    # the variance
    row("(x - mean) ** 2", by(variance=lambda h, c: (c**2).mean(-1, keepdim=True))),
    row("a sum of squares over n", by(variance=lambda h, c: (c * c).sum(-1, keepdim=True) / N)),
    row("var(correction=0)", by(variance=lambda h, c: h.var(-1, correction=0, keepdim=True))),
    row("var(unbiased=False)", by(variance=lambda h, c: h.var(-1, unbiased=False, keepdim=True))),
    row("std() ** 2", by(variance=lambda h, c: h.std(-1, correction=0, keepdim=True) ** 2)),
    row("var_mean", by_var_mean, bias=True),
    # the quotient and eps
    row("c / sqrt", by(product=lambda c, v: c / torch.sqrt(v + EPS))),
    row("c * v ** -0.5", by(product=lambda c, v: c * (v + EPS) ** -0.5)),
    row("eps as a tensor", by(product=lambda c, v: torch.rsqrt(v + torch.tensor(EPS)) * c)),
    row("no eps", by(product=lambda c, v: c * torch.rsqrt(v)), eps=0.0),
    # weight, bias and casts
    row("weight and bias after the cast", lambda h, w, b: rounded(h) * w + b, bias=True, **AFTER),
    row("bias after the cast", lambda h, w, b: layer_norm(h, w) + b, bias=True),
    row("bias first", lambda h, w, b: b + layer_norm(h, w), bias=True),
    row("bias by alpha=1", lambda h, w, b: torch.add(layer_norm(h, w), b, alpha=1), bias=True),
    row("bias as [1, n]", lambda h, w, b: (layer_norm(h.float(), w.float()) + b[None]).to(h.dtype), bias=True),
    row("bias.expand_as(x)", lambda h, w, b: layer_norm(h, w) + b.expand_as(h), bias=True),
    row("a bias of float32", lambda h, w, b: (layer_norm(h.float(), w.float()) + b).to(h.dtype), given=FLOAT_BIAS, bias=True),
    row("a bias of two parts", lambda h, w, b: layer_norm(h, w, b - 2 * w), bias=True),
    row("never rounded", lambda h, w, b: layer_norm(h.float(), w.float(), b.float()), bias=True, norm_dtype=torch.float32),
    row("without casts", without_casts, bias=True, **AFTER),
    row("without casts, float32", without_casts, given=FLOAT, bias=True),
    row("through float64", lambda h, w, b: layer_norm(h.double(), w.double(), b.double()).to(h.dtype), bias=True),
    row("flattened", flattened, bias=True),
    # what stands behind the norm and is no part of it
    row("a bias that is subtracted", lambda h, w, b: layer_norm(h, w) - b),
    row("a bias twice", lambda h, w, b: torch.add(layer_norm(h, w), b, alpha=2)),
    row("a number that is added", lambda h, w, b: layer_norm(h, w) + 1.0),
    row("scaled behind it", lambda h, w, b: layer_norm(h, w, b) * 2.0, bias=True),
    # the residual
    Case("LayerNorm without residual", lambda x, r, w, b: layer_norm(reduce(x), w, b), LAYER, NORMED, {}, WITH_BIAS, bias=True),
    Case("LayerNorm without residual, the sum is the next one", lambda x, r, w: (cohere(a := reduce(x), w), a + 1), LAYER, NORMED | REDUCED),
    Case("LayerNorm without residual, flattened", lambda x, r, w: (layer_norm(a := reduce(x).view(-1, N), w), a), LAYER, NORMED | REDUCED),
    Case("LayerNorm, residual dead", lambda x, r, w: layer_norm(r + reduce(x), w), ADD_LAYER),
    Case("LayerNorm, a tensor of its shape added to it", lambda x, r, w: (layer_norm(s := r + reduce(x), w) + r, s), ADD_LAYER, BOTH),
    Case("LayerNorm, a tensor broadcast over the batch added to it", lambda x, r, w: (layer_norm(s := r + reduce(x), w) + r[:1], s), ADD_LAYER, BOTH),
    Case("LayerNorm, sum live", lambda x, r, w: (layer_norm(s := r + (a := reduce(x)), w), s, a.view(-1)), ADD_LAYER, BOTH | REDUCED),
    Case("LayerNorm, float32 residual stream", lambda x, r, w, b: (layer_norm(s := r + reduce(x), w.float(), b.float()), s), ADD_LAYER, BOTH, {}, STREAM, bias=True),
    Case("LayerNorm of the unrounded sum", unrounded, ADD_LAYER, BOTH, {"norm_of_unrounded_sum": True}, WITH_BIAS, bias=True),
    Case("LayerNorm behind a bias and the residual", lambda x, r, w, b: (layer_norm(s := r + (reduce(x) + w), w, b), s), ADD_LAYER, BOTH, TAKEN_APART, WITH_BIAS, bias=True),
    Case("LayerNorm of a parallel block", parallel, ADD_LAYER, BOTH, TAKEN_APART, WITH_BIAS, bias=True, others=((BIAS,), ())),
    Case("LayerNorm is the next residual", the_norm_is_the_next_residual, ADD_LAYER, BOTH, {}, WITH_BIAS, bias=True, others=((ADD_LAYER,), ())),
    Case("LayerNorm is the next residual, of one token", the_norm_is_the_next_residual, ADD_LAYER, BOTH, {}, ONE_TOKEN, bias=True, others=((ADD_LAYER,), ())),
    # a bias alone
    Case("bias", lambda x, r, w: reduce(x) + w, BIAS, SUM),
    Case("bias on the left", lambda x, r, w: w + reduce(x), BIAS, SUM),
    Case("bias as [1, 1, n]", lambda x, r, w: reduce(x) + w[None, None], BIAS, SUM),
    Case("bias of a flattened sum", lambda x, r, w: (reduce(x).view(-1, N) + w).view(x.shape), BIAS, SUM),
    Case("bias in place", bias_in_place, BIAS, SUM),
    Case("bias of a sum in place, with other strides, the sum live", bias_in_place_with_other_strides, BIAS, SUM | REDUCED),
    Case("bias of float32", lambda x, r, w: reduce(x) + w, BIAS, SUM, {}, Given(weight=torch.float32)),
    Case("bias, rounded to the sum's dtype", lambda x, r, w: reduce(x) + w.to(x.dtype), BIAS, SUM, {}, Given(weight=torch.float32)),
    Case("bias, the sum live", lambda x, r, w: ((a := reduce(x)) + w, a * 2), BIAS, SUM | REDUCED),
    Case("bias of symbolic sizes", lambda x, r, w: reduce(x) + w, BIAS, SUM, dynamic=True),
    Case("bias before an activation", lambda x, r, w: torch.tanh(reduce(x) + w), BIAS, SUM),
    Case("bias before a residual that nothing norms", lambda x, r, w: (reduce(x) + w) + r, BIAS, SUM),
    Case("two biased sums", lambda x, r, w: torch.tanh((reduce(x) + w) + (reduce(r) - w)), BIAS, SUM, others=((), ("all_reduce",))),
    Case("bias before an RMSNorm", lambda x, r, w: norm(reduce(x) + w, w), BIAS, SUM),
]  # fmt: skip
