"""How the residual is added: orders, views, dtypes, in place, and which of the values live on."""

from typing import Any

import torch
from torch import Tensor

from tests.corpus.case import (
    ADD,
    AFTER,
    BARE,
    BOTH,
    EPS,
    NORMED,
    PLAIN,
    REDUCED,
    SANDWICH,
    Case,
    Given,
    N,
    norm,
    reduce,
    wide_norm,
)

STREAM = Given(residual=torch.float32)
FOURTH = Given(more=(lambda: torch.linspace(-1, 1, 6 * N).view(2, 3, N).bfloat16(),))
POST = {"post_eps": EPS, "post_weight_bias": 0.0, "post_norm_dtype": None}
TAKEN_APART = {**AFTER, "reassociated": True}
UNROUNDED = {**AFTER, "norm_of_unrounded_sum": True}


def two_views(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r.view(-1, N) + reduce(x).view(-1, N)
    return norm(total.view(x.shape), w), total


def in_place(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = reduce(x)
    total += r
    return norm(total, w), total


def in_place_into_a_copy(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r.clone()
    total.add_(reduce(x))
    return norm(total, w), total


def rounded_sum(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = (reduce(x).float() + r.float()).to(x.dtype)
    return norm(total, w), total


def stream_rounded(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = (reduce(x) + r).to(x.dtype)
    return norm(total, w), total


def vllm(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """vLLM's native form: the norm of the sum before it is rounded."""
    wide = reduce(x).to(torch.float32) + r.to(torch.float32)
    total = wide.to(x.dtype)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return normed.to(x.dtype) * w, total


def vllm_weight_first(x: Tensor, r: Tensor, w: Tensor) -> Any:
    wide = reduce(x).float() + r.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (normed * w.float()).to(x.dtype), wide.to(x.dtype)


def vllm_promoting(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """Only the sum is widened; the residual is by promotion."""
    wide = reduce(x).float() + r
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return normed.to(x.dtype) * w, wide.to(x.dtype)


def parallel_block(x: Tensor, r: Tensor, w: Tensor, more: Tensor) -> Any:
    total = more + reduce(x) + reduce(r)
    return norm(total, w), total


def sandwich(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """Gemma 2 and GLM-4 norm the branch, add it, and norm the sum again."""
    total = norm(reduce(x), w) + r
    return norm(total, w), total


def gemma_sandwich(x: Tensor, r: Tensor, w: Tensor) -> Any:
    def gemma(h: Tensor) -> Tensor:
        wide = h.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w.float())).to(h.dtype)

    total = r + gemma(reduce(x))
    return gemma(total), total


CASES = [
    Case("norm before and after the residual", sandwich, SANDWICH, BOTH, {**AFTER, **POST}),
    Case("norm before and after, Gemma's", gemma_sandwich, SANDWICH, BOTH, {**POST, "weight_bias": 1.0, "post_weight_bias": 1.0}),
    Case("norm before and after, the first one live", lambda x, r, w: (norm(s := (n := norm(reduce(x), w)) + r, w), s, n * 2), SANDWICH, BOTH | {"post_normed"}, {**AFTER, **POST}),
    Case("norm before and after, the sums dead", lambda x, r, w: norm(norm(reduce(x), w) + r, w), SANDWICH, NORMED, {**AFTER, **POST}),
    Case("norm before and after, another epsilon", lambda x, r, w: (norm(s := norm(reduce(x), w, 1e-3) + r, w), s), SANDWICH, BOTH, {**AFTER, **POST, "post_eps": 1e-3}),
    Case("first norm, no residual", lambda x, r, w: norm(reduce(x), w), PLAIN, NORMED, AFTER),
    Case("first norm, the sum is the next residual", lambda x, r, w: (norm(a := reduce(x), w), a + 1), PLAIN, NORMED | REDUCED, AFTER),
    Case("first norm of the flattened sum", lambda x, r, w: (norm(a := reduce(x).view(-1, N), w), a), PLAIN, NORMED | REDUCED, AFTER),
    Case("residual first", lambda x, r, w: (norm(s := r + reduce(x), w), s), ADD, BOTH, AFTER),
    Case("residual last", lambda x, r, w: (norm(s := reduce(x) + r, w), s), ADD, BOTH, AFTER),
    Case("residual dead after the norm", lambda x, r, w: norm(r + reduce(x), w), ADD, NORMED, AFTER),
    Case("sum live beside the residual", lambda x, r, w: (norm(s := r + (a := reduce(x)), w), s, a.view(-1)), ADD, BOTH | REDUCED, AFTER),
    Case("sum live, residual dead", lambda x, r, w: (norm(r + (a := reduce(x)), w), a), ADD, NORMED | REDUCED, AFTER),
    Case("a cast of the sum used elsewhere", lambda x, r, w: (norm(s := r + reduce(x), w), s.float() * 2), ADD, BOTH, AFTER),
    Case("a view of the sum used elsewhere", lambda x, r, w: (norm(s := r + reduce(x), w), s.view(-1, N) @ s.view(-1, N).T), ADD, BOTH, AFTER),
    Case("the residual is used again", lambda x, r, w: (norm(s := r + reduce(x), w), s, r * 2), ADD, BOTH, AFTER),
    Case("scaled residual", lambda x, r, w: (norm(s := r * 0.5 + reduce(x), w), s), ADD, BOTH, AFTER),
    Case("residual scaled by alpha", lambda x, r, w: (norm(s := torch.add(reduce(x), r, alpha=0.5), w), s), ADD, BOTH, AFTER),
    Case("residual subtracted", lambda x, r, w: (norm(s := reduce(x) - r, w), s), ADD, BOTH, AFTER),
    Case("a bias behind the sum", lambda x, r, w: (norm(s := r + (reduce(x) + w), w), s), ADD, BOTH, TAKEN_APART),
    Case("a bias of two dimensions behind the sum", lambda x, r, w: (norm(s := (reduce(x) + w.view(1, -1)) + r, w), s), ADD, BOTH, TAKEN_APART),
    Case("a bias behind the sum, flattened", lambda x, r, w: (norm(s := r.view(-1, N) + (reduce(x) + w).view(-1, N), w), s), ADD, BOTH, TAKEN_APART),
    Case("a bias on the residual's side", lambda x, r, w: (norm(s := reduce(x) + (r + w), w), s), ADD, BOTH, AFTER),
    Case("a bias on each side", lambda x, r, w: (norm(s := (reduce(x) + w) + (r - 2 * w), w), s), ADD, BOTH, TAKEN_APART),
    Case("a scaled adapter behind the sum", lambda x, r, w, more: (norm(s := r + (reduce(x) + more * 2.0), w), s), ADD, BOTH, TAKEN_APART, FOURTH),
    Case("an adapter scaled by a tensor", lambda x, r, w, more: (norm(s := r + (reduce(x) + more * w), w), s), ADD, BOTH, TAKEN_APART, FOURTH),
    Case("four addends", lambda x, r, w, more: (norm(s := ((w + reduce(x)) - more) + r * 0.5, w), s), ADD, BOTH, TAKEN_APART, FOURTH),
    Case("norm dead", lambda x, r, w: r + reduce(x), BARE, REDUCED),
    Case("torch.add", lambda x, r, w: (norm(s := torch.add(r, reduce(x)), w), s), ADD, BOTH, AFTER),
    Case("alpha=1", lambda x, r, w: (norm(s := torch.add(reduce(x), r, alpha=1), w), s), ADD, BOTH, AFTER),
    Case("+=", in_place, ADD, BOTH, AFTER),
    Case("add_ into a copy of the residual", in_place_into_a_copy, ADD, BOTH, AFTER),
    Case("flattened on both sides", two_views, ADD, BOTH, AFTER),
    Case("residual flattened", lambda x, r, w: (norm(s := reduce(x.view(-1, N)) + r.view(-1, N), w), s.view(x.shape)), ADD, BOTH, AFTER),
    Case("branch unflattened", lambda x, r, w: (norm(s := r + reduce(x.view(-1, N)).view(x.shape), w), s), ADD, BOTH, AFTER),
    Case("residual stored flat", lambda x, r, w: (norm(s := r.reshape(-1).view(x.shape) + reduce(x), w), s), ADD, BOTH, AFTER),
    Case("contiguous on either side", lambda x, r, w: (norm(s := r.contiguous() + reduce(x).contiguous(), w), s), ADD, BOTH, AFTER),
    Case("a batch of its own", lambda x, r, w: (norm(s := r.unsqueeze(0) + reduce(x).unsqueeze(0), w), s.squeeze(0)), ADD, BOTH, AFTER),
    Case("residual from another dtype", lambda x, r, w: (norm(s := r.to(x.dtype) + reduce(x), w), s), ADD, BOTH, AFTER, STREAM),
    Case("float32 residual stream", lambda x, r, w: (wide_norm(s := r + reduce(x), w), s), ADD, BOTH, {}, STREAM),
    Case("float32 residual stream by a cast", lambda x, r, w: (norm(s := r.float() + reduce(x), w), s), ADD, BOTH, {"residual_dtype": torch.float32}),
    Case("float32 residual stream, the sum widened", lambda x, r, w: (wide_norm(s := reduce(x).float() + r, w), s), ADD, BOTH, {}, STREAM),
    Case("float32 residual stream, norm in bfloat16", lambda x, r, w: (norm(s := r + reduce(x), None).to(x.dtype) * w, s), ADD, BOTH, {**AFTER, "norm_dtype": torch.bfloat16}, STREAM),
    Case("float32 residual stream rounded after the add", stream_rounded, ADD, BOTH, {**AFTER, "residual_dtype": torch.bfloat16}, STREAM),
    Case("sum in float32 and rounded", rounded_sum, ADD, BOTH, AFTER),
    Case("sum in float32 and rounded, residual dead", lambda x, r, w: rounded_sum(x, r, w)[0], ADD, NORMED, AFTER),
    Case("vLLM's norm of the unrounded sum", vllm, ADD, BOTH, UNROUNDED),
    Case("vLLM's norm, rounded once", vllm_weight_first, ADD, BOTH, {"norm_of_unrounded_sum": True}),
    Case("vLLM's norm, the residual promoted", vllm_promoting, ADD, BOTH, UNROUNDED),
    Case("vLLM's norm, residual dead", lambda x, r, w: vllm(x, r, w)[0], ADD, NORMED, {**AFTER, "residual_dtype": torch.float32, "norm_dtype": torch.bfloat16}),
    Case("vLLM's residual alone", lambda x, r, w: vllm(x, r, w)[1], BARE, REDUCED),
    Case("the other branch of a parallel block", lambda x, r, w: norm(reduce(x) + reduce(r), w), ADD, NORMED, AFTER, others=((BARE,), ())),
    Case("a parallel block's branches and the residual", parallel_block, ADD, BOTH, AFTER, FOURTH, others=((BARE,), ())),
    Case("two residuals, the branch last", lambda x, r, w, b: (norm(s := r + b + reduce(x), w), s), ADD, BOTH, AFTER, FOURTH),
    Case("two residuals in brackets", lambda x, r, w, b: (norm(s := reduce(x) + (r + b), w), s), ADD, BOTH, AFTER, FOURTH),
    Case("two adds in a row", lambda x, r, w, b: (norm(s := r + reduce(x) + b, w), s), ADD, BOTH, AFTER, FOURTH),
    Case("residual made by an operator", lambda x, r, w: (norm(s := torch.tanh(r) + reduce(x), w), s), ADD, BOTH, AFTER),
    Case("residual made behind the all_reduce", lambda x, r, w: (norm(s := reduce(x) + torch.tanh(r), w), s), ADD, BOTH, AFTER),
]  # fmt: skip
