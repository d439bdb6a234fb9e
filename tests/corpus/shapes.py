"""Sizes known late or not at all, inputs that are written into, outputs that alias inputs, and odd shapes."""

from typing import Any

import torch
from torch import Tensor

from tests.corpus.case import ADD, AFTER, BOTH, NORMED, PLAIN, REDUCED, WIDE, Case, Given, N, norm, reduce
from tests.corpus.quantisation import GROUP, QUANTIZED, RESIDUAL, SCALE, STATIC, TOKEN, per_group, per_token, q
from tests.corpus.residuals import two_views


def whole(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r + reduce(x)
    return norm(total, w), total


def literal_eps(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """Compiled with ``dynamic=True``, a float that is not a literal or a module's attribute would be a symbol."""
    total = r + reduce(x)
    return norm(total, w, 1e-5), total


def flattened_literal_eps(x: Tensor, r: Tensor, w: Tensor) -> Any:
    total = r.view(-1, N) + reduce(x).view(-1, N)
    return norm(total.view(x.shape), w, 1e-5), total


def first_tokens(x: Tensor, r: Tensor, w: Tensor, count: Tensor) -> Any:
    """A token count that the graph reads from a tensor."""
    tokens = count.item()
    torch._check(tokens >= 2)
    torch._check(tokens <= x.shape[0])
    return whole(x[:tokens], r[:tokens], w)


def routed(x: Tensor, r: Tensor, w: Tensor, mask: Tensor) -> Any:
    """As a mixture of experts gathers its tokens."""
    chosen = mask.nonzero().squeeze(-1)
    return whole(x[chosen], r[chosen], w)


def residual_written_before(x: Tensor, r: Tensor, w: Tensor) -> Any:
    r.add_(1.0)
    return whole(x, r, w)


def residual_written_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
    results = whole(x, r, w)
    r.mul_(2.0)
    return results


def residual_holds_the_sum(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """The stream is kept in one buffer, as serving engines do."""
    r.add_(reduce(x))
    return norm(r, w)


def sum_copied_into_residual(x: Tensor, r: Tensor, w: Tensor) -> Any:
    r.copy_(total := r + reduce(x))
    return norm(total, w)


def weight_written_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
    results = whole(x, r, w)
    w.zero_()
    return results


def input_written_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
    results = whole(x, r, w)
    x.zero_()
    return results


def norm_into_a_buffer(x: Tensor, r: Tensor, w: Tensor, out: Tensor) -> Any:
    normed, total = whole(x, r, w)
    out.copy_(normed)
    return total


def input_reduced_in_place(x: Tensor, r: Tensor, w: Tensor) -> Any:
    torch.distributed.all_reduce(x)
    return norm(r + x, w)


def aliases_input(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return *whole(x, r, w), r, x.view(-1)


def aliases_output(x: Tensor, r: Tensor, w: Tensor) -> Any:
    normed, total = whole(x, r, w)
    return normed, normed.view(-1, N), total, total[:1]


def of(*shape: int, **differing: Any) -> Given:
    return Given(shape=shape, **differing)


def sized(name: str, *shape: int, function: Any = whole, **differing: Any) -> Case:
    return Case(f"shape: {name}", function, ADD, BOTH, AFTER, of(*shape, **differing))


TOKENS = Given(dynamic=(1,))
BATCH = Given(dynamic=(0,))
SCALED = Given(shape=(2, 3, WIDE), dynamic=(1,), more=(lambda: torch.tensor(0.05),))
WIDE_TOKENS = Given(shape=(2, 3, WIDE), dynamic=(1,))
COUNT = Given(shape=(8, N), more=(lambda: torch.tensor(5),))
MASK = Given(shape=(8, N), more=(lambda: torch.arange(8) % 3 != 0,))
BUFFER = Given(more=(lambda: torch.zeros(2, 3, N, dtype=torch.bfloat16),))

CASES = [
    # sizes that are symbols
    Case("tokens by mark_dynamic", whole, ADD, BOTH, AFTER, TOKENS),
    Case("batch by mark_dynamic", whole, ADD, BOTH, AFTER, BATCH),
    Case("batch and tokens by mark_dynamic", whole, ADD, BOTH, AFTER, Given(dynamic=(0, 1))),
    Case("tokens of a matrix by mark_dynamic", whole, ADD, BOTH, AFTER, of(6, N, dynamic=(0,))),
    Case("first norm, tokens by mark_dynamic", lambda x, r, w: norm(reduce(x), w), PLAIN, NORMED, AFTER, TOKENS),
    Case("flattened, tokens by mark_dynamic", two_views, ADD, BOTH, AFTER, TOKENS),
    Case("dynamic=True", literal_eps, ADD, BOTH, AFTER, dynamic=True),
    Case("one token each, batch and sequence exchanged", lambda x, r, w: (norm(s := r.transpose(0, 1) + reduce(x).transpose(0, 1), w), s), ADD, BOTH, AFTER, of(5, 1, N)),
    Case("one token each, exchanged for the norm alone", lambda x, r, w: (norm((s := r + reduce(x)).permute(1, 0, 2), w).permute(1, 0, 2), s), ADD, BOTH, AFTER, of(5, 1, N)),
    Case("one token each, the sum moved to where the residual is", lambda x, r, w: (norm(s := r.view(1, 5, N) + reduce(x).movedim(1, 0), w), s), ADD, BOTH, AFTER, of(5, 1, N)),
    Case("a dimension of size 1 by expand", lambda x, r, w: (norm(s := r.unsqueeze(0) + reduce(x).expand(1, *x.shape), w), s), ADD, BOTH, AFTER),
    Case("dynamic=True, eps a global of a module", lambda x, r, w: (norm(s := r + reduce(x), w), s), ADD, BOTH, AFTER, dynamic=True),
    Case("dynamic=True, flattened", flattened_literal_eps, ADD, BOTH, AFTER, dynamic=True),
    Case("dynamic=True, of a matrix", literal_eps, ADD, BOTH, AFTER, of(6, N), dynamic=True),
    Case("static FP8, tokens by mark_dynamic", lambda x, r, w, s: (q(norm(h := r + reduce(x), w), s), h), STATIC, QUANTIZED | RESIDUAL, AFTER, SCALED),
    Case("per token, tokens by mark_dynamic", lambda x, r, w: (per_token(norm(h := r + reduce(x), w)), h), TOKEN, QUANTIZED | SCALE | RESIDUAL, AFTER, WIDE_TOKENS),
    Case("per group, tokens by mark_dynamic", lambda x, r, w: (per_group(norm(h := r + reduce(x), w)), h), GROUP, QUANTIZED | SCALE | RESIDUAL, AFTER, WIDE_TOKENS),
    # sizes without a value at compile time
    Case("tokens by mark_unbacked", whole, ADD, BOTH, AFTER, of(6, N, unbacked=(0,))),
    Case("tokens counted by item()", first_tokens, ADD, BOTH, AFTER, COUNT),
    Case("tokens found by nonzero()", routed, ADD, BOTH, AFTER, MASK),
    # inputs that are written into
    Case("residual written before", residual_written_before, ADD, BOTH, AFTER),
    Case("residual written later", residual_written_later, ADD, BOTH, AFTER),
    Case("residual that holds the sum", residual_holds_the_sum, ADD, BOTH, AFTER),
    Case("sum copied into the residual", sum_copied_into_residual, ADD, BOTH, AFTER),
    Case("weight written later", weight_written_later, ADD, BOTH, AFTER),
    Case("x written later", input_written_later, ADD, BOTH, AFTER),
    Case("x reduced in place", input_reduced_in_place, ADD, NORMED | REDUCED, AFTER),
    Case("norm into a buffer", norm_into_a_buffer, ADD, BOTH, AFTER, BUFFER),
    # outputs that alias
    Case("outputs that alias inputs", aliases_input, ADD, BOTH, AFTER),
    Case("outputs that alias outputs", aliases_output, ADD, BOTH, AFTER),
    # shapes
    sized("one dimension", N),
    sized("two dimensions", 5, N),
    sized("three dimensions", 2, 3, N),
    sized("four dimensions", 2, 1, 3, N),
    sized("one token", 1, N),
    sized("one of everything", 1, 1, N),
    sized("hidden size 1", 3, 1),
    sized("as many tokens as the hidden size", N, N),
    sized("no tokens", 0, N),
    sized("no batch", 0, 3, N),
    sized("flattened, no tokens", 2, 0, N, function=two_views),
    sized("transposed", 3, 5, function=lambda x, r, w: whole(x.transpose(0, 1).contiguous().transpose(0, 1), r, w)),
]  # fmt: skip
