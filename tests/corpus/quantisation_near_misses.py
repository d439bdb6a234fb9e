"""What looks like a quantisation of the norm and is none: the norm stands, and the refusal says why."""

from typing import Any

import torch
from torch import Tensor

from tests.corpus.case import ADD, FP8, WIDE, Given, NearMiss, norm, reduce
from tests.corpus.quantisation import (
    FNUZ,
    GROUP,
    MAX,
    SCALAR,
    STATIC,
    TOKEN,
    TOKENS,
    amax,
    codes,
    per_group,
    per_token,
    q,
)

EIGHTS = Given(shape=(2, 3, WIDE), more=(lambda: torch.full((WIDE,), 0.05),))


def q_after(quantise: Any, given: Given = TOKENS) -> Any:
    """Quantised in a way that is no pattern's, behind the residual add and the norm."""
    return lambda x, r, w, *more: quantise(norm(r + reduce(x), w), *more)


def along_tokens(n: Tensor) -> Any:
    s = n.float().abs().amax(-2, keepdim=True) / MAX
    return codes(n.float() / s), s


def groups_across(n: Tensor) -> Any:
    """Groups of elements that are n / g apart."""
    groups = n.float().view(*n.shape[:-1], 128, -1)
    s = groups.abs().amax(-2, keepdim=True) / MAX
    return codes(groups / s).view(n.shape), s.squeeze(-2)


def groups_of_tokens(n: Tensor) -> Any:
    groups = n.float().view(2, 3, WIDE)
    s = groups.abs().amax(1, keepdim=True) / MAX
    return codes(groups / s).view(n.shape), s


def blocks(n: Tensor) -> Any:
    """Two-dimensional blocks, as weights are quantised."""
    view = n.float().view(2, 3, 2, 128)
    s = view.abs().amax((1, 3), keepdim=True) / MAX
    return codes(view / s).view(n.shape), s


def per_tensor(n: Tensor) -> Any:
    s = n.float().abs().max() / MAX
    return codes(n.float() / s), s


def int8(n: Tensor) -> Any:
    s = amax(n) / 127
    return torch.clamp(torch.round(n.float() / s), -128, 127).to(torch.int8), s


def int8_static(n: Tensor, s: Tensor) -> Any:
    return torch.clamp(torch.round(n.float() / s), -128, 127).to(torch.int8)


def e5m2(n: Tensor, s: Tensor) -> Any:
    return (n.float() / s).clamp(-57344.0, 57344.0).to(torch.float8_e5m2)


def e5m2_token(n: Tensor) -> Any:
    s = amax(n) / 57344.0
    return (n.float() / s).to(torch.float8_e5m2), s


def clamp_below_the_scale(n: Tensor) -> Any:
    s = amax(n) / MAX
    return codes(n.float() / s, FP8, 240.0), s


def fnuz_of_448(n: Tensor) -> Any:
    s = amax(n) / MAX
    return (n.float() / s).clamp(-240.0, 240.0).to(FNUZ), s


def signed_maximum(n: Tensor) -> Any:
    """The largest value instead of the largest magnitude."""
    s = n.float().amax(-1, keepdim=True).clamp(min=1e-12) / MAX
    return codes(n.float() / s), s


def another_scale(n: Tensor) -> Any:
    """Quantised by twice the scale that it gives away."""
    s = amax(n) / MAX
    return codes(n.float() / (s * 2)), s


def root_mean_square_scale(n: Tensor) -> Any:
    s = n.float().square().mean(-1, keepdim=True).sqrt() / 10
    return codes(n.float() / s), s


def offset(n: Tensor, s: Tensor) -> Any:
    """A zero point."""
    return codes(n.float().abs() / s + 16.0)


def one_sided(n: Tensor, s: Tensor) -> Any:
    return (n.float() / s).clamp(0.0, MAX).to(FP8)


def rounded_down(s: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(s)))


def powers_below(n: Tensor) -> Any:
    groups = n.float().view(2, 3, -1, 128)
    s = rounded_down((groups.abs().amax(-1, keepdim=True) / MAX).clamp(min=1e-10))
    return codes(groups / s).view(n.shape), s.squeeze(-1)


def twice(x: Tensor, r: Tensor, w: Tensor, s: Tensor, other: Tensor) -> Any:
    n = norm(h := r + reduce(x), w)
    return q(n, s), q(n, other), h


def quant(name: str, of: str, quantise: Any, because: str, given: Given = TOKENS, **differing: Any) -> NearMiss:
    """The norm stands, its quantisation does not."""
    return NearMiss(
        name, q_after(quantise), **{"stands": ADD, "because": because, "of": of, "given": given, **differing}
    )


NEAR_MISSES = [
    # static quantisation
    quant("scale per channel", STATIC, q, "shape [256]", EIGHTS),
    quant("scale per token given", STATIC, q, "[2, 3, 1]", Given(shape=(2, 3, WIDE), more=(lambda: torch.full((2, 3, 1), 0.05),))),
    quant("int8, static", STATIC, int8_static, "rounds to whole numbers", SCALAR),
    quant("e5m2, static", STATIC, e5m2, "float8_e5m2", SCALAR),
    quant("a zero point", STATIC, offset, "a zero point", SCALAR),
    quant("a clamp on one side", STATIC, one_sided, "bounded unequally", SCALAR),
    quant("a cast without a scale", STATIC, lambda n: codes(n.float()), "needs a scale that is a tensor"),
    quant("a cast of nothing", STATIC, lambda n: (n.float() * 0.0).to(FP8), "0 times"),
    quant("a negated quotient", STATIC, lambda n, s: (n.float() / -s).to(FP8), "-1 times", SCALAR),
    quant("a negated quotient of a scale for each token", TOKEN, lambda n: (-n.float() / amax(n) * MAX).to(FP8), "times the quotient"),
    quant("a scale that is a number", STATIC, lambda n: codes(n.float() / 0.05), "0.05"),
    quant("a scale in bfloat16", STATIC, q, "bfloat16", Given(shape=(2, 3, WIDE), more=(lambda: torch.tensor(0.05).bfloat16(),))),
    NearMiss("quantised twice", twice, ADD, "quantised", STATIC, Given(shape=(2, 3, WIDE), more=(lambda: torch.tensor(0.05), lambda: torch.tensor(0.1)))),
    NearMiss("quantise of another tensor", lambda x, r, w, s: (q(r, s), norm(r + reduce(x), w)), ADD, "quantize_static_fp8", STATIC, SCALAR),
    NearMiss("quantise of the sum", lambda x, r, w, s: (q(h := r + reduce(x), s), norm(h, w)), ADD, "quantize_static_fp8", STATIC, SCALAR),
    NearMiss("quantise of the norm's tanh", lambda x, r, w, s: q(torch.tanh(norm(r + reduce(x), w)), s), ADD, "followed by tanh", STATIC, SCALAR),
    # dynamic quantisation
    quant("one scale for the whole tensor", TOKEN, per_tensor, "whole"),
    quant("scale over tokens", TOKEN, along_tokens, "dimension 1"),
    quant("int8, per token", TOKEN, int8, "rounds to whole numbers"),
    quant("e5m2, per token", TOKEN, e5m2_token, "float8_e5m2"),
    quant("clamp below the scale's maximum", TOKEN, clamp_below_the_scale, "240"),
    quant("fnuz by e4m3fn's maximum", TOKEN, fnuz_of_448, "448, and codes are bounded by 240"),
    quant("the largest value instead of magnitude", TOKEN, signed_maximum, "values themselves"),
    quant("quantised by another scale than the one given", TOKEN, another_scale, "inside the chain is used by output"),
    quant("a scale from the mean of squares", TOKEN, root_mean_square_scale, "is not divided by its maximum"),
    quant("groups across the hidden size", GROUP, groups_across, "dimension 2"),
    quant("groups of tokens", GROUP, groups_of_tokens, "dimension 1"),
    quant("blocks", GROUP, blocks, "dimensions 1 and 3"),
    quant("powers of two rounded down", GROUP, powers_below, "floor"),
    NearMiss("per token of another tensor", lambda x, r, w: (per_token(r), norm(r + reduce(x), w)), ADD, "quantize_token_fp8", TOKEN, TOKENS),
    NearMiss("per group of the sum", lambda x, r, w: (per_group(h := r + reduce(x)), norm(h, w)), ADD, "quantize_group_fp8", GROUP, TOKENS),
]  # fmt: skip
