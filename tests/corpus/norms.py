"""Spellings of the RMSNorm, each behind ``residual + all_reduce(x)`` whose sum lives on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.corpus.case import ADD, AFTER, BOTH, EPS, Case, Given, N, gemma, norm, reduce, wide_norm
from tests.support.device import DEVICE

USUAL = Given()


def row(
    name: str,
    spelling: Callable[[Tensor, Tensor], Any],
    *,
    given: Given = USUAL,
    weight: bool = True,
    **differing: Any,
) -> Case:
    """A spelling of ``norm(h, w)`` behind the residual add."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        total = r + reduce(x)
        return spelling(total, w), total

    return Case(name, model, ADD, BOTH, differing, given, weight=weight)


def root(h: Tensor, eps: float = EPS) -> Tensor:
    return torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + eps)


def times_root(mean: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm with a mean of squares of one's own, kept with size 1."""
    return lambda h, w: (h.float() * torch.rsqrt(mean(h.float()) + EPS) * w.float()).to(h.dtype)


def times_inverse(inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm with an inverse root of one's own, of the mean of squares and eps."""
    return lambda h, w: (h.float() * inverse(h.float().pow(2).mean(-1, keepdim=True) + EPS) * w.float()).to(h.dtype)


def times_shifted(shifted: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm with eps added in one's own way to the mean of squares."""
    return lambda h, w: (h.float() * torch.rsqrt(shifted(h.float().pow(2).mean(-1, keepdim=True))) * w.float()).to(
        h.dtype
    )


def rounded(h: Tensor) -> Tensor:
    """The norm without weight, in the dtype of what is normed."""
    return norm(h, None)


def through_unsqueeze(h: Tensor, w: Tensor) -> Tensor:
    inverse = torch.rsqrt(h.float().pow(2).mean(-1) + EPS)
    return (h.float() * inverse.unsqueeze(-1) * w.float()).to(h.dtype)


def through_none(h: Tensor, w: Tensor) -> Tensor:
    inverse = torch.rsqrt(h.float().pow(2).mean(-1) + EPS)
    return (h.float() * inverse[..., None] * w.float()).to(h.dtype)


def through_view(h: Tensor, w: Tensor) -> Tensor:
    inverse = torch.rsqrt(h.float().pow(2).mean(-1).view(*h.shape[:-1], 1) + EPS)
    return (h.float() * inverse * w.float()).to(h.dtype)


def flattened(h: Tensor, w: Tensor) -> Tensor:
    return norm(h.view(-1, h.shape[-1]), w).view(h.shape)


def flattened_inside(h: Tensor, w: Tensor) -> Tensor:
    flat = h.float().view(-1, h.shape[-1])
    return (flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + EPS)).view(h.shape).to(h.dtype) * w


def divided_by_the_rms(h: Tensor, w: Tensor) -> Tensor:
    rms = (h.float().pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return ((h.float() / rms) * w.float()).to(h.dtype)


def eps_times_n(h: Tensor, w: Tensor) -> Tensor:
    """``x · sqrt(n) / sqrt(sum(x²) + n · eps)``."""
    wide = h.float()
    return (wide * (N**0.5) * torch.rsqrt(wide.square().sum(-1, keepdim=True) + N * EPS) * w.float()).to(h.dtype)


def double_square_root(h: Tensor, w: Tensor) -> Tensor:
    """The root taken twice and squared: still the inverse root."""
    wide = h.float()
    return (wide * torch.rsqrt(torch.sqrt(wide.square().mean(-1, keepdim=True) + EPS)) ** 2 * w.float()).to(h.dtype)


def square_over_root(h: Tensor, w: Tensor) -> Tensor:
    wide = h.float()
    return w * (wide / torch.sqrt((wide * wide).mean(-1, keepdim=True) + EPS)).to(h.dtype)


def sum_over_n_to_a_power(h: Tensor, w: Tensor) -> Tensor:
    wide = h.float()
    return (w.float() * (wide * ((wide.square().sum(-1) / N + EPS) ** -0.5).unsqueeze(-1))).to(h.dtype)


def t5(h: Tensor, w: Tensor) -> Tensor:
    """T5's layer norm, which is an RMSNorm."""
    variance = h.to(torch.float32).pow(2).mean(-1, keepdim=True)
    normed = h * torch.rsqrt(variance + EPS)
    return w * (normed.to(w.dtype) if w.dtype in (torch.float16, torch.bfloat16) else normed)


def meta_llama(h: Tensor, w: Tensor) -> Tensor:
    """Meta's own: ``type_as`` before the weight."""
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).type_as(h) * w


def olmo(h: Tensor, w: Tensor) -> Tensor:
    """OLMo2's: weight before the cast, ``weight * x``."""
    wide = h.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * wide).to(h.dtype)


HALF = Given(dtype=torch.float16)
FLOAT = Given(dtype=torch.float32)
FLOAT_WEIGHT = Given(weight=torch.float32)
GEMMA = {"weight_bias": 1.0}

with_weight = torch.nn.RMSNorm(N, EPS, dtype=torch.bfloat16, device=DEVICE)
with_weight.requires_grad_(False).weight.copy_(Given()()[2])
without_weight = torch.nn.RMSNorm(N, EPS, elementwise_affine=False)
captured = torch.tensor(EPS)

CASES = [
    # torch's own
    row("F.rms_norm", lambda h, w: F.rms_norm(h, (N,), w, EPS)),
    row("F.rms_norm without weight", lambda h, w: F.rms_norm(h, (N,), eps=EPS), weight=False),
    row("F.rms_norm without eps", lambda h, w: F.rms_norm(h, (N,), w), eps=torch.finfo(torch.float32).eps),
    row("F.rms_norm in float32", lambda h, w: F.rms_norm(h, (N,), w, EPS), given=FLOAT),
    row("F.rms_norm in float16", lambda h, w: F.rms_norm(h, (N,), w, EPS), given=HALF),
    row("F.rms_norm of a wider tensor", lambda h, w: F.rms_norm(h.float(), (N,), w.float(), EPS).to(h.dtype)),
    row("F.rms_norm and then the weight", lambda h, w: w * F.rms_norm(h, (N,), eps=EPS), **AFTER),
    row("F.rms_norm with Gemma's weight", lambda h, w: F.rms_norm(h, (N,), 1 + w, EPS), **GEMMA),
    row("nn.RMSNorm", lambda h, w: with_weight(h)),
    row("nn.RMSNorm without weight", lambda h, w: without_weight(h), weight=False),
    # what models really write
    row("Hugging Face Llama", norm, **AFTER),
    row("Meta's Llama", meta_llama, **AFTER),
    row("T5", t5, **AFTER),
    row("OLMo2", olmo),
    row("Gemma", gemma, **GEMMA),
    row("weight in float32 before the cast", wide_norm),
    row("no weight", lambda h, w: norm(h, None), weight=False),
    row("any epsilon", lambda h, w: norm(h, w, 0.03), **AFTER, eps=0.03),
    row("a tiny epsilon", lambda h, w: norm(h, w, 1e-12), **AFTER, eps=1e-12),
    row("no epsilon", lambda h, w: (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True)) * w.float()).to(h.dtype), eps=0.0),
    # the square
    row("pow(2)", times_root(lambda h: h.pow(2).mean(-1, keepdim=True))),
    row("** 2", times_root(lambda h: (h**2).mean(-1, keepdim=True))),
    row("pow(2.0)", times_root(lambda h: torch.pow(h, 2.0).mean(-1, keepdim=True))),
    row("x * x", times_root(lambda h: (h * h).mean(-1, keepdim=True))),
    row("square()", times_root(lambda h: h.square().mean(-1, keepdim=True))),
    row("abs().pow(2)", times_root(lambda h: h.abs().pow(2).mean(-1, keepdim=True))),
    row("norm()**2 / n", times_root(lambda h: h.norm(dim=-1, keepdim=True) ** 2 / N)),
    row("vector_norm()**2 / n", times_root(lambda h: torch.linalg.vector_norm(h, dim=-1, keepdim=True) ** 2 / N)),
    row("(norm() / sqrt(n))**2", times_root(lambda h: (h.norm(p=2, dim=-1, keepdim=True) / N**0.5).square())),
    row("(norm() * n**-0.5)**2", times_root(lambda h: (h.norm(2, -1, True) * N**-0.5).pow(2))),
    # the mean
    row("mean over the last positive index", times_root(lambda h: h.pow(2).mean(2, keepdim=True))),
    row("mean over a tuple", times_root(lambda h: h.pow(2).mean((-1,), keepdim=True))),
    row("mean over a list, with a dtype", times_root(lambda h: torch.mean(h.pow(2), dim=[-1], keepdim=True, dtype=torch.float32))),
    row("sum / n", times_root(lambda h: h.pow(2).sum(-1, keepdim=True) / N)),
    row("sum / shape[-1]", times_root(lambda h: h.pow(2).sum(dim=(-1,), keepdim=True) / h.shape[-1])),
    row("sum * (1 / n)", times_root(lambda h: h.pow(2).sum(-1, keepdim=True) * (1.0 / N))),
    row("1 / n * sum", times_root(lambda h: torch.sum(h * h, -1, keepdim=True).mul(1 / N))),
    row("the mean of x / sqrt(n) times sqrt(n)", times_root(lambda h: (h / N**0.5).square().sum(-1, keepdim=True))),
    row("eps before the division by n", times_inverse(lambda v: torch.rsqrt(v * N / N))),
    row("sqrt(n) drawn out of the root", eps_times_n),
    # the root
    row("rsqrt", times_inverse(torch.rsqrt)),
    row("1 / sqrt", times_inverse(lambda v: 1 / torch.sqrt(v))),
    row("sqrt().reciprocal()", times_inverse(lambda v: v.sqrt().reciprocal())),
    row("pow(-0.5)", times_inverse(lambda v: torch.pow(v, -0.5))),
    row("** -0.5", times_inverse(lambda v: v**-0.5)),
    row("1 / (** 0.5)", times_inverse(lambda v: 1.0 / v**0.5)),
    row("reciprocal().sqrt()", times_inverse(lambda v: v.reciprocal().sqrt())),
    row("x / sqrt", divided_by_the_rms),
    row("x / (** 0.5)", lambda h, w: (h.float() / (h.float().square().mean(-1, True) + EPS) ** 0.5).to(h.dtype) * w, **AFTER),
    row("x * x and a root below", square_over_root, **AFTER),
    row("a sum over n to the power -0.5", sum_over_n_to_a_power),
    row("rsqrt of a root, squared", double_square_root),
    # eps
    row("eps on the left", times_shifted(lambda v: EPS + v)),
    row("eps as a tensor", times_shifted(lambda v: v + torch.tensor(EPS))),
    row("eps as a tensor on the left", times_shifted(lambda v: torch.tensor(EPS) + v)),
    row("eps as a tensor of one element", times_shifted(lambda v: v + torch.full((1,), EPS))),
    row("eps as a full tensor", times_shifted(lambda v: v + torch.full_like(v, EPS))),
    row("eps subtracted", times_shifted(lambda v: v - -EPS)),
    row("eps by torch.add", times_shifted(lambda v: torch.add(v, EPS))),
    row("eps in place", times_shifted(lambda v: v.add_(EPS))),
    row("eps in two parts", times_shifted(lambda v: v + EPS / 2 + EPS / 2)),
    row("eps by alpha", times_shifted(lambda v: torch.add(v, EPS / 2, alpha=2))),
    row("a square of a small number as eps", times_shifted(lambda v: v + 1e-3**2), eps=1e-6),
    # products
    row("(x * root) * w", lambda h, w: ((h.float() * root(h)) * w.float()).to(h.dtype)),
    row("x * (root * w)", lambda h, w: (h.float() * (root(h) * w.float())).to(h.dtype)),
    row("(root * x) * w", lambda h, w: ((root(h) * h.float()) * w.float()).to(h.dtype)),
    row("root * (x * w)", lambda h, w: (root(h) * (h.float() * w.float())).to(h.dtype)),
    row("w * (x * root)", lambda h, w: (w.float() * (h.float() * root(h))).to(h.dtype)),
    row("(w * root) * x", lambda h, w: ((w.float() * root(h)) * h.float()).to(h.dtype)),
    row("(w * x) / rms", lambda h, w: ((w.float() * h.float()) / torch.sqrt(h.float().square().mean(-1, True) + EPS)).to(h.dtype)),
    row("in place", lambda h, w: h.float().mul_(root(h)).mul_(w.float()).to(h.dtype)),
    # the weight and the cast
    row("w after the cast, in the input's dtype", lambda h, w: rounded(h) * w, **AFTER),
    row("w after the cast, in float32", lambda h, w: rounded(h) * w.float(), **AFTER, norm_dtype=torch.float32),
    row("w after the cast, in float32 and rounded", lambda h, w: (rounded(h) * w).to(h.dtype), given=FLOAT_WEIGHT, **AFTER),
    row("rounded and widened, then w", lambda h, w: (rounded(h).float() * w.float()).to(h.dtype), **AFTER),
    row("w of float32 before the cast", lambda h, w: (h.float() * root(h) * w).to(h.dtype), given=FLOAT_WEIGHT),
    row("w in the input's dtype before the cast", lambda h, w: (h.float() * root(h) * w).to(h.dtype)),
    row("w of float32 rounded to the input's dtype", lambda h, w: w.to(h.dtype) * rounded(h), given=FLOAT_WEIGHT, **AFTER),
    row("never rounded", lambda h, w: h.float() * root(h) * w.float(), norm_dtype=torch.float32),
    row("a float32 weight of Hugging Face's norm", norm, given=FLOAT_WEIGHT, **AFTER, norm_dtype=torch.float32),
    row("the root rounded first", lambda h, w: h * root(h).to(h.dtype) * w, **AFTER),
    # the weight's bias
    row("1 + w after the cast", lambda h, w: rounded(h) * (1 + w), **AFTER, **GEMMA),
    row("w + 1", lambda h, w: (h.float() * root(h) * (w + 1)).to(h.dtype), **GEMMA),
    row("w.float() + 1.0", lambda h, w: (h.float() * root(h) * (w.float() + 1.0)).to(h.dtype), **GEMMA),
    row("1 + w.float() after the cast", lambda h, w: (rounded(h) * (1 + w.float())).to(h.dtype), **AFTER, **GEMMA),
    row("ones_like(w) + w", lambda h, w: (h.float() * root(h) * (torch.ones_like(w) + w).float()).to(h.dtype), **GEMMA),
    row("torch.ones(n) + w", lambda h, w: (h.float() * root(h) * (torch.ones(N) + w.float())).to(h.dtype), **GEMMA),
    row("a bias in two parts", lambda h, w: (h.float() * root(h) * ((w.float() - 0.5) + 1.5)).to(h.dtype), **GEMMA),
    row("a bias in place", lambda h, w: (h.float() * root(h) * w.float().add_(1)).to(h.dtype), **GEMMA),
    row("w - (-1)", lambda h, w: (h.float() * root(h) * (w.float() - -1)).to(h.dtype), **GEMMA),
    row("normed + normed * w", lambda h, w: (h.float() * root(h) * torch.add(w.float(), 0.25)).to(h.dtype), weight_bias=0.25),
    row("a bias that is taken back", lambda h, w: (h.float() * root(h) * ((w.float() + 1) - 1)).to(h.dtype)),
    # casts
    row("no casts, float32", lambda h, w: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w, given=FLOAT),
    row("Hugging Face's in float32", norm, given=FLOAT),
    row("Hugging Face's in float16", norm, given=HALF, **AFTER),
    row("no casts, bfloat16", lambda h, w: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS), weight=False),
    row("through float64", lambda h, w: (h.double() * torch.rsqrt(EPS + h.double().pow(2).mean(-1, True)) * w).to(h.dtype)),
    row("through float32 and float64", lambda h, w: (h.float() * torch.rsqrt(h.float().double().pow(2).mean(-1, True) + EPS).float() * w.float()).to(h.dtype)),
    row("through a dtype by its name", lambda h, w: (h.type(torch.float32) * root(h)).type(h.dtype) * w, **AFTER),
    row("widened twice", lambda h, w: (h.float().float() * root(h.float())).to(h.dtype) * w, **AFTER),
    # the shape of the root and of the weight
    row("unsqueeze", through_unsqueeze),
    row("[..., None]", through_none),
    row("view(..., 1)", through_view),
    row("reshape(-1, 1)", lambda h, w: (h.float().view(-1, N) * torch.rsqrt(h.float().square().mean(-1).reshape(-1, 1) + EPS)).view(h.shape).to(h.dtype) * w, **AFTER),
    row("root.expand_as(x)", lambda h, w: (h.float() * root(h).expand_as(h) * w.float()).to(h.dtype)),
    row("root.expand(shape)", lambda h, w: (h.float() * root(h).expand(2, 3, N) * w.float()).to(h.dtype)),
    row("root broadcast", lambda h, w: (h.float() * torch.broadcast_to(root(h), h.shape) * w.float()).to(h.dtype)),
    row("w.expand_as(x)", lambda h, w: (h.float() * root(h) * w.float().expand_as(h)).to(h.dtype)),
    row("w as [1, 1, n]", lambda h, w: rounded(h) * w[None, None], **AFTER),
    row("w.view(1, 1, -1)", lambda h, w: (h.float() * root(h) * w.float().view(1, 1, -1)).to(h.dtype)),
    row("w.reshape(1, n)", lambda h, w: (h.float() * root(h) * w.float().reshape(1, N)).to(h.dtype)),
    row("w.unsqueeze(0) + 1", lambda h, w: (h.float() * root(h) * (w.float().unsqueeze(0) + 1)).to(h.dtype), **GEMMA),
    # views and copies in between
    row("flattened", flattened, **AFTER),
    row("flattened inside", flattened_inside, **AFTER),
    row("contiguous in between", lambda h, w: norm(h.contiguous(), w).contiguous(), **AFTER),
    row("a clone in between", lambda h, w: norm(h.clone(), w), **AFTER),
    row("unflattened and flattened", lambda h, w: norm(h.view(3, 2, N).view(6, N), w).view(h.shape), **AFTER),
    row("an unsqueezed batch", lambda h, w: norm(h.unsqueeze(0), w).squeeze(0), **AFTER),
    row("a detach in between", lambda h, w: norm(h.detach(), w), **AFTER),
]  # fmt: skip
