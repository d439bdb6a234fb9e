"""What looks like a longer pattern and is none: the shorter one stands, and the refusal says why."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from tests.corpus.all_reduces import SECOND
from tests.corpus.case import (
    ADD,
    ADD_LAYER,
    AFTER,
    BARE,
    BIAS,
    EPS,
    LAYER,
    PLAIN,
    Case,
    Given,
    N,
    NearMiss,
    norm,
    reduce,
)

FLOAT = Given(dtype=torch.float32)
AT_RUN_TIME = Given(more=(lambda: torch.tensor(EPS),))


def weigh_rows(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + reduce(x), None) * torch.arange(6.0, dtype=x.dtype, device=x.device).view(2, 3, 1)


def weigh_everything(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + reduce(x), None) * r


def weigh_a_square(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """As many tokens as the hidden size: a weight for each token is not one along the hidden size."""
    return norm(r + reduce(x), None) * w[:, None]


def inverse(h: Tensor) -> Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def in_float32(
    product: Callable[[Tensor, Tensor], Tensor], variance: Callable[[Tensor], Tensor] = torch.Tensor.square
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A quotient of ``total - mean`` and its variance, times the weight."""

    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        total = r + reduce(x)
        centred = total - total.mean(-1, keepdim=True)
        return product(centred, variance(centred).mean(-1, keepdim=True)) * w

    return model


def fast_variance(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """The variance as the mean of squares minus the square of the mean: exact in theory, inexact in float32."""
    total = r + reduce(x)
    mean = total.mean(-1, keepdim=True)
    return (total - mean) * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) - mean.pow(2) + EPS) * w


def sample_variance(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return (total - total.mean(-1, keepdim=True)) * torch.rsqrt(total.var(-1, keepdim=True) + EPS) * w


def saved_statistics(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    variance, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    return (total - mean) * torch.rsqrt(variance + EPS) * w, mean


def mean_of_columns(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """As many rows as columns: the mean of a row is taken from a column."""
    total = r + reduce(x)
    centred = total - total.mean(-1)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * w


def not_centred(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return total * torch.rsqrt(total.var(-1, keepdim=True, correction=0) + EPS) * w


def another_mean(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return (total - r.mean(-1, keepdim=True)) * torch.rsqrt(total.var(-1, keepdim=True, correction=0) + EPS) * w


def over_rows(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return w * total * torch.rsqrt(total.pow(2).mean(1, keepdim=True) + EPS)


def over_everything(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return w * total * torch.rsqrt(total.pow(2).mean((-2, -1), keepdim=True) + EPS)


def dropped_dimension(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = reduce(torch.cat([x.view(-1, N)] * 3)[:N])  # as many rows as columns
    return total * torch.rsqrt(total.pow(2).mean(-1) + EPS)


def saved(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    root = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + EPS)
    return (total * root).to(x.dtype) * w, root


def feeds_itself(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = reduce(x)
    return norm(total + torch.tanh(total), w)


def clamped(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True).clamp(min=EPS)) * w


def larger(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return total * torch.rsqrt(torch.maximum(total.pow(2).mean(-1, keepdim=True), torch.tensor(EPS))) * w


def heads(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """The norm of queries and keys: over each head, not over the hidden size."""
    return norm(reduce(x).view(2, 3, 2, N // 2), w[: N // 2])


def heads_of_the_sum(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm((r + reduce(x)).view(2, 3, 2, N // 2), w[: N // 2])


def written_between(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    total[..., 0] = 0.0
    return norm(total, w)


def scaled_in_place(x: Tensor, r: Tensor, w: Tensor) -> Any:
    reduced = reduce(x)
    reduced.mul_(0.5)
    return norm(r + reduced, w)


def gemma_embedding(x: Tensor, r: Tensor, w: Tensor) -> Any:
    hidden = reduce(x) * N**0.5
    return norm(hidden, w), hidden


def gemma_embedding_by_a_tensor(x: Tensor, r: Tensor, w: Tensor) -> Any:
    hidden = reduce(x) * torch.tensor(N**0.5, dtype=x.dtype)
    return norm(hidden, w), hidden


def norm_and_then_residual(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = norm(reduce(x), w) + r
    return total, total * 2


def hierarchical(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + funcol.all_reduce(reduce(x), "sum", SECOND["name"]), w)


def add(name: str, function: Any, because: str, **differing: Any) -> NearMiss:
    """Of ``all_reduce → add → norm`` the all_reduce alone stands."""
    return NearMiss(name, function, **{"stands": BARE, "because": because, "of": ADD, **differing})


def plain(name: str, function: Any, because: str, **differing: Any) -> NearMiss:
    """Of ``all_reduce → norm`` the all_reduce alone stands."""
    return add(name, function, because, of=PLAIN, **differing)


NEAR_MISSES = [
    # another normalisation
    add("F.group_norm", lambda x, r, w: F.group_norm((r + reduce(x)).view(-1, N, 1), 2), "a variance about the mean over dimensions 2 and 3 of 4", given=FLOAT),
    add("F.normalize times sqrt(n)", lambda x, r, w: F.normalize(r + reduce(x), dim=-1) * N**0.5 * w, "bounded below", given=FLOAT),
    # LayerNorm
    add("a mean that nothing divides", lambda x, r, w: (s := r + reduce(x)) - s.mean(-1, keepdim=True), "a mean of the values themselves, as LayerNorm takes it", given=FLOAT),
    add("a variance alone", lambda x, r, w: (r + reduce(x)).var(-1, correction=0), "a variance about the mean, as LayerNorm takes it", given=FLOAT),
    add("LayerNorm by a fast variance", fast_variance, "as LayerNorm takes it", given=FLOAT),
    add("LayerNorm by a sample's variance", sample_variance, "divides by n - 1", of=ADD_LAYER, given=FLOAT),
    add("LayerNorm, eps outside the root", in_float32(lambda c, v: c / (torch.sqrt(v) + EPS)), "outside the root", of=ADD_LAYER, given=FLOAT),
    add("LayerNorm, eps as a clamp", in_float32(lambda c, v: c * torch.rsqrt(v.clamp(min=EPS))), "bounded below", of=ADD_LAYER, given=FLOAT),
    add("LayerNorm without a root", in_float32(lambda c, v: c / (v + EPS)), "power -1", of=ADD_LAYER, given=FLOAT),
    add("LayerNorm of another root", in_float32(lambda c, v: c * torch.rsqrt(v + EPS), torch.abs), "as LayerNorm takes it", given=FLOAT),
    add("LayerNorm of a mean over all rows", lambda x, r, w: F.layer_norm(r + reduce(x), (3, N)), "over dimensions 1 and 2", of=ADD_LAYER, given=FLOAT),
    add("a root that is of the centred sum and multiplies the sum", not_centred, "minus its mean and multiplies", of=ADD_LAYER, given=FLOAT),
    add("the mean is added", lambda x, r, w: ((s := r + reduce(x)) + s.mean(-1, keepdim=True)) * torch.rsqrt(s.var(-1, correction=0, keepdim=True) + EPS), "minus its mean and multiplies add", of=ADD_LAYER, given=FLOAT),
    add("half the mean is subtracted", lambda x, r, w: ((s := r + reduce(x)) - s.mean(-1, keepdim=True) / 2) * torch.rsqrt(s.var(-1, correction=0, keepdim=True) + EPS), "minus its mean and multiplies sub", of=ADD_LAYER, given=FLOAT),
    add("another tensor's mean", another_mean, "minus its mean and multiplies sub", of=ADD_LAYER, given=FLOAT),
    add("LayerNorm of a scaled sum", lambda x, r, w: F.layer_norm(2 * (r + reduce(x)), (N,), w, eps=EPS), "scaled by 2", of=ADD_LAYER, given=FLOAT),
    add("LayerNorm by the variance of a scaled sum", lambda x, r, w: ((s := r + reduce(x)) - s.mean(-1, keepdim=True)) * torch.rsqrt((2 * s).var(-1, correction=0, keepdim=True) + EPS), "is a variance of add", of=ADD_LAYER, given=FLOAT),
    add("LayerNorm, eps given at run time", lambda x, r, w, e: (c := (s := r + reduce(x)) - s.mean(-1, keepdim=True)) * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + e), "run time", of=ADD_LAYER, given=AT_RUN_TIME),
    add("LayerNorm, its mean used elsewhere", saved_statistics, "inside the chain is used by", of=ADD_LAYER, given=FLOAT),
    add("residual added after the LayerNorm", lambda x, r, w: F.layer_norm(reduce(x), (N,), w, eps=EPS) + r, "is normed before anything is added to it", stands=LAYER),
    add("LayerNorm, its mean broadcast along the wrong dimension", mean_of_columns, "as LayerNorm takes it", given=Given((N, N), torch.float32)),
    add("LayerNorm over heads", lambda x, r, w: F.layer_norm((r + reduce(x)).view(2, 3, 2, N // 2), (N // 2,)), "16 becomes 8", of=ADD_LAYER),
    # the mean
    add("mean over another dimension", over_rows, "dimension 1", given=FLOAT),
    add("mean over two dimensions", over_everything, "dimensions 1 and 2", given=FLOAT),
    plain("mean broadcast along the wrong dimension", dropped_dimension, "of shape [16], is broadcast", given=FLOAT),
    plain("mean over a part", lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a[..., : N // 2].pow(2).mean(-1, keepdim=True) + EPS), "the root is of slice", given=FLOAT),
    plain("mean of absolute values", lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a.abs().mean(-1, keepdim=True) + EPS), "a mean of |x|", given=FLOAT),
    plain("mean of cubes", lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a.abs().pow(3).mean(-1, keepdim=True) + EPS), "powers of 3", given=FLOAT),
    plain("sum without n", lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a.pow(2).sum(-1, keepdim=True) + EPS), "scaled by 0.25", given=FLOAT),
    plain("sum over n - 1", lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a.pow(2).sum(-1, keepdim=True) / (N - 1) + EPS), "scaled by 0.968246", given=FLOAT),
    plain("maximum of squares", lambda x, r, w: (a := reduce(x)) * torch.rsqrt(a.pow(2).amax(-1, keepdim=True) + EPS), "amax", given=FLOAT),
    # the root and eps
    plain("eps outside the root", lambda x, r, w: (a := reduce(x)) * (torch.rsqrt(a.pow(2).mean(-1, keepdim=True)) + EPS), "outside the root", given=FLOAT),
    plain("eps beside the root", lambda x, r, w: (a := reduce(x)) / (torch.sqrt(a.pow(2).mean(-1, keepdim=True)) + EPS), "outside the root", given=FLOAT),
    add("eps as a clamp", clamped, "bounded below by 1e-05", given=FLOAT),
    add("eps as a maximum", larger, "bounded below by 1e-05", given=FLOAT),
    plain("eps given at run time", lambda x, r, w, e: (a := reduce(x)) * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + e) * w, "run time", given=AT_RUN_TIME),
    plain("scaled eps given at run time", lambda x, r, w, e: (a := reduce(x)) * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 2 * e) * w, "run time", given=AT_RUN_TIME),
    plain("root instead of its inverse", lambda x, r, w: (a := reduce(x)) * torch.sqrt(a.pow(2).mean(-1, keepdim=True) + EPS), "to the power 0.5", given=FLOAT),
    plain("the inverse without a root", lambda x, r, w: (a := reduce(x)) / (a.pow(2).mean(-1, keepdim=True) + EPS), "power -1", given=FLOAT),
    plain("the root alone", lambda x, r, w: inverse(reduce(x)), "all_reduce is followed by pow", given=FLOAT),
    plain("the square of the tensor", lambda x, r, w: (a := reduce(x)) * a * inverse(a), "needs the root of what it multiplies", given=FLOAT),
    plain("a root that is one tensor's and multiplies another", lambda x, r, w: r * inverse(reduce(x)), "needs the root of what it multiplies", given=FLOAT),
    add("a root that others use", saved, "inside the chain is used by output"),
    # another tensor
    plain("another tensor is normed", lambda x, r, w: (reduce(x) * 2, norm(r, w)), "followed by mul"),
    plain("heads", heads, "16 becomes 8"),
    add("heads of the sum", heads_of_the_sum, "16 becomes 8"),
    plain("a slice", lambda x, r, w: norm(reduce(x)[..., : N // 2], w[: N // 2]), "slice"),
    plain("rows of it", lambda x, r, w: norm(reduce(x)[:1], w), "slice"),
    plain("a chunk", lambda x, r, w: norm(reduce(x).chunk(2, -1)[0], w[: N // 2]), "part"),
    plain("the last token", lambda x, r, w: norm(reduce(x)[:, -1], w), "select"),
    plain("a transposed view", lambda x, r, w: norm(reduce(x).transpose(0, 1), w), "followed by transpose"),
    plain("a concatenation", lambda x, r, w: norm(torch.cat([reduce(x), r]), w), "cat"),
    plain("an activation in between", lambda x, r, w: norm(torch.relu(reduce(x)), w), "relu"),
    plain("rounded in between", lambda x, r, w: norm(reduce(x).to(torch.bfloat16), w), "bfloat16", given=FLOAT, by_casts=True),
    add("written between", written_between, "select_scatter"),
    add("a float64 model", lambda x, r, w: norm(r + reduce(x), w), "float64", given=Given(dtype=torch.float64)),
    # the residual
    add("residual computed from the sum", feeds_itself, "computed from the all_reduce's result", given=FLOAT),
    add("scaled branch", lambda x, r, w: norm(r + reduce(x) * 0.5, w), "scaled by 0.5", given=FLOAT),
    add("Granite's residual multiplier", lambda x, r, w: (norm(s := r + reduce(x) * 0.22, w), s), "scaled by 0.22"),
    add("branch divided", lambda x, r, w: norm(r + reduce(x) / 4, w), "scaled by 0.25"),
    add("branch scaled in place", scaled_in_place, "scaled by 0.5"),
    add("alpha", lambda x, r, w: norm(torch.add(r, reduce(x), alpha=2), w), "the all_reduce's side of", given=FLOAT),
    add("subtracted", lambda x, r, w: norm(r - reduce(x), w), "scaled by -1", given=FLOAT),
    add("gated branch", lambda x, r, w: norm(r + reduce(x) * torch.sigmoid(r), w), "followed by mul"),
    add("layer scale", lambda x, r, w: norm(r + reduce(x) * w, w), "followed by mul"),
    add("broadcast residual", lambda x, r, w: norm(r[:1] + reduce(x), w), "shape [1, 3, 16]", given=FLOAT),
    add("a sum with a bias that the model also uses", lambda x, r, w: (norm(s := r + (i := reduce(x) + w), w), s, i * 2), "shape [16]", stands=BIAS, given=FLOAT),
    add("a bias as the residual", lambda x, r, w: norm(reduce(x) + w, w), "shape [16]", stands=BIAS, given=FLOAT),
    add("a bias of one element", lambda x, r, w: norm(reduce(x) + w[:1], w), "followed by add", given=FLOAT),
    NearMiss("a scaled bias", lambda x, r, w: torch.add(reduce(x), w, alpha=2), BARE, "followed by add", of=BIAS, given=FLOAT),
    add("a number as the residual", lambda x, r, w: norm(reduce(x) + 1.0, w), "followed by add", given=FLOAT),
    add("residual added after the norm", norm_and_then_residual, "is normed before anything is added to it", stands=PLAIN),
    add("multiplied instead of added", lambda x, r, w: norm(r * reduce(x), w), "followed by mul", given=FLOAT),
    plain("Gemma's scaled embedding", gemma_embedding, "scaled by 4"),
    plain("Gemma's scaled embedding, by a tensor", gemma_embedding_by_a_tensor, "scaled by 4"),
    # the weight
    # the all_reduce
    *(add(f"the {op} of all ranks", lambda x, r, w, op=op: norm(r + reduce(x, op), w), f"takes the {op}", stands=BARE) for op in ("max", "min", "avg", "product")),
    add("reduced over two groups", hierarchical, "all_reduce", others=((), (ADD,))),
]  # fmt: skip

CASES = [
    # what multiplies the norm is no weight of its own: the norm without weight stands, the product stays behind it
    Case("a weight for each token", weigh_rows, weight=False),
    Case("a weight for each element", weigh_everything, weight=False),
    Case("a weight for each of as many tokens", weigh_a_square, given=Given(shape=(N, N)), weight=False),
    Case("a weight that is a number", lambda x, r, w: norm(r + reduce(x), None) * 2.0, weight=False),
    Case("a second weight", lambda x, r, w: norm(r + reduce(x), w) * w, attributes=AFTER),
]  # fmt: skip
