"""Layers whose vectors are gathered whole, normed or not, and cut again; what workers run of them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fusion_core
from fusion_core import FusionConfig, FusionPass, Registry, Report
from fusion_core._torch.inductor import post_grad_only
from fusion_core.agree import kernel_calls
from fusion_core.patterns.means import MEANS
from tests.corpus.case import norm
from tests.support.collectives import reaching_the_group

BATCH, TOKENS, SIZE = 2, 5, 8
"""A batch of sentences, and the elements of a head."""
QUERIES, KEYS = 4, 2
"""Heads of each rank."""


def gathered(x: Tensor) -> Tensor:
    """As DTensor redistributes it."""
    ranks, group = dist.get_world_size(), dist.group.WORLD.group_name  # type: ignore[union-attr]
    parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), ranks, group)
    return torch.cat(torch.ops._c10d_functional.wait_tensor(parts).chunk(ranks), -1)


def moved(x: Tensor) -> Tensor:
    """As vLLM writes it, over `torch.distributed`'s own collective."""
    ranks = dist.get_world_size()
    whole = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous())
    whole = whole.view(ranks, *x.shape).movedim(0, x.dim() - 1)
    return whole.reshape(*x.shape[:-1], ranks * x.shape[-1])


def listed(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, -1)


def own(x: Tensor, rank: int | None = None) -> Tensor:
    ranks, rank = dist.get_world_size(), dist.get_rank() if rank is None else rank
    size = x.shape[-1] // ranks
    return x[..., rank * size : (rank + 1) * size]


def chunked(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size(), -1)[dist.get_rank()]


def rotated(x: Tensor) -> Tensor:
    """A rotary embedding's shape: halves of each head, and an angle for each token."""
    one, other = x.chunk(2, -1)
    angle = torch.linspace(0, 1, x.shape[-2] * x.shape[-1]).view(x.shape[-2], x.shape[-1]).to(x.dtype)
    return x * angle.cos() + torch.cat((-other, one), -1) * angle.sin()


def _heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:-1], -1, SIZE).transpose(1, 2)


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product of batch and heads is one dimension of the matrix products."""
    k, v = (each.repeat_interleave(QUERIES // KEYS, 1) for each in (k, v))
    mask = torch.full((q.shape[2], q.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
    return torch.softmax(q @ k.transpose(2, 3) / SIZE**0.5 + mask, -1) @ v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor, attention: Callable[..., Tensor] = _by_sdpa
) -> tuple[Tensor, Tensor]:
    """OLMo 2's attention: the result of all heads, and the values that a cache would keep."""
    q, k, v = norm(gathered(q), wq), norm(gathered(k), wk), gathered(v)
    values = _heads(v)
    found = attention(rotated(_heads(q)), rotated(_heads(k)), values)
    return found.transpose(1, 2).flatten(2), values


def _with_a_cache(*given: Tensor) -> tuple[Tensor, Tensor]:
    found, values = _attend(*given)  # type: ignore[call-arg]
    return own(found), values


def _used_whole(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return own(norm(x, weight)), x.amax(-1)


def _three_in_one(whole: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values as Phi-3 cuts them; the queries are as long as rank 0's part."""
    return whole[..., :32] * 2, whole[..., 32:48] * 2, whole[..., 48:] * 2


Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]

LAYERS: dict[str, Layer] = {
    "a norm": lambda q, k, v, wq, wk: own(norm(gathered(q), wq)),
    "torch.distributed": lambda q, k, v, wq, wk: own(norm(moved(q), wq)),
    "a list": lambda q, k, v, wq, wk: chunked(norm(listed(q), wq)),
    "without weight": lambda q, k, v, wq, wk: own(norm(gathered(q), None)),
    "in float32": lambda q, k, v, wq, wk: own(F.rms_norm(gathered(q).float(), wq.shape, wq.float(), 1e-5).bfloat16()),
    "no norm": lambda q, k, v, wq, wk: own(gathered(v)) * 2,
    "two norms": lambda q, k, v, wq, wk: (own(norm(gathered(q), wq)), own(norm(gathered(k), wk))),
    "attention": lambda q, k, v, wq, wk: own(_attend(q, k, v, wq, wk)[0]),
    "attention by hand": lambda q, k, v, wq, wk: own(_attend(q, k, v, wq, wk, _by_hand)[0]),
    "attention and a cache": lambda *given: _with_a_cache(*given),
    "another rank's part": lambda q, k, v, wq, wk: own(norm(gathered(q), wq), 0),
    "another order": lambda q, k, v, wq, wk: own(
        norm(torch.cat(gathered(q).chunk(dist.get_world_size(), -1)[::-1], -1), wq)
    ),
    "smaller parts": lambda q, k, v, wq, wk: norm(gathered(q), wq)[..., : q.shape[-1] // 2],
    "used whole": lambda q, k, v, wq, wk: _used_whole(gathered(q), wq),
    "normed whole": lambda q, k, v, wq, wk: norm(gathered(q), wq) + 1,
    "two in one": lambda q, k, v, wq, wk: own(torch.mul(*gathered(q).chunk(2, -1))),
    "three in one": lambda q, k, v, wq, wk: _three_in_one(gathered(q)),
    "gathered whole": lambda q, k, v, wq, wk: gathered(q) + 1,
}


def tensors(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[Tensor, ...]:
    """Queries, keys and values of this rank, and the whole weights of the norms."""
    mine = torch.Generator().manual_seed(dist.get_rank() + 1)
    common, ranks = torch.Generator().manual_seed(0), dist.get_world_size()
    parts = [torch.randn(BATCH, tokens, n * SIZE, generator=mine).to(dtype) for n in (QUERIES, KEYS, KEYS)]
    weights = [(torch.randn(n * SIZE * ranks, generator=common) + 1).to(dtype) for n in (QUERIES, KEYS)]
    return (*parts, *weights)


@dataclass
class Run:
    """What one rank saw of a layer.

    Attributes:
        report: Of the compiled graph.
        fused: Collectives that reached the process group in one call.
        unfused: The same as the model is written.
        error: The largest difference of the result from the model's in float64.
        own_error: That of the model as it is written.
        operators: Those of the compiled graph.
    """

    report: Report
    fused: Counter[str]
    unfused: Counter[str]
    error: float
    own_error: float
    operators: list[str]


def _flat(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, tuple | list) else [found]


def _largest(found: Any, exact: Any) -> float:
    pairs = zip(_flat(found), _flat(exact), strict=True)
    return max(float((one.double() - other).abs().max()) for one, other in pairs)


def run(name: str, dtype: torch.dtype = torch.float32, dynamic: bool = False, order: Any = ("reference",)) -> Run:
    """Compile a layer up to the graph that Inductor generates code for."""
    torch._dynamo.reset()
    layer, given = LAYERS[name], tensors(dtype)
    reports: list[Report] = []
    operators: list[str] = []
    own_pass = FusionPass(FusionConfig(order=order))

    def look(graph: torch.fx.Graph) -> None:
        reports.append(own_pass.run(graph))
        graph.lint()
        operators.extend(str(node.target) for node in graph.nodes if node.op == "call_function")

    with torch.no_grad():
        for each in given[:3] if dynamic else ():
            torch._dynamo.mark_dynamic(each, 1)
        compiled = torch.compile(layer, backend=post_grad_only(look), fullgraph=True)
        found = compiled(*given)
        if dynamic:  # another size, the same graph
            given = tensors(dtype, TOKENS + 2)
            found = compiled(*given)
            assert len(reports) == 1
        exact = layer(*(each.double() for each in given))
        return Run(
            reports[0],
            reaching_the_group(lambda: compiled(*given)),
            reaching_the_group(lambda: layer(*given)),
            _largest(found, exact),
            _largest(layer(*given), exact),
            operators,
        )


@dataclass
class Whole:
    """What one rank saw of a layer that the public door and all of Inductor compiled.

    Attributes:
        text: The report's first line.
        explained: The pattern and the strategy at each site, by `fusion_core.explain` before.
        placed: The same, of the compiled graph.
        error: The largest difference of the result from the model's in float64.
    """

    text: str
    explained: list[tuple[str, str | None]]
    placed: list[tuple[str, str | None]]
    error: float


def through_inductor(name: str, dynamic: bool) -> Whole:
    """A layer, explained, compiled and run."""
    torch._dynamo.reset()
    layer, given = LAYERS[name], tensors()
    around = torch.inference_mode() if dynamic else torch.no_grad()
    with around, torch._inductor.config.patch(force_disable_caches=True):
        for each in given[:3] if dynamic else ():
            torch._dynamo.mark_dynamic(each, 1)
        explained = fusion_core.explain(layer, *given)
        found = torch.compile(layer, backend="fusion_core", fullgraph=True)(*given)
        report = fusion_core.last_report()
        assert report is not None
        named = [[(site.pattern, site.strategy) for site in each.sites] for each in (explained, report)]
        text = str(report).partition("\n")[0]
        return Whole(text, *named, _largest(found, layer(*(each.double() for each in given))))


@dataclass
class Apart:
    """What one rank saw where ranks have different graphs."""

    error: float
    said: str
    warnings: list[str]
    calls: Counter[str]


def _apart(layer: Layer, exact: Layer) -> Apart:
    torch._dynamo.reset()
    given = tensors()
    own_pass = FusionPass(FusionConfig(order=("reference",)))
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compiled = torch.compile(layer, backend=post_grad_only(own_pass))
        found = compiled(*given)
        calls = reaching_the_group(lambda: compiled(*given))
        error = _largest(found, exact(*(each.double() for each in given)))
    return Apart(error, str(fusion_core.last_report()), [str(each.message) for each in said], calls)


def another_ranks_part() -> Apart:
    """Both ranks use the part of rank 0; the other one has no kernel, and announces nothing."""
    with mock.patch.object(kernel_calls, "TIMEOUT", 3.0):
        return _apart(LAYERS["another rank's part"], LAYERS["another rank's part"])


def ranks_differ() -> Apart:
    """Rank 1 has a graph break between two norms that rank 0 has in one graph."""

    def layer(q: Tensor, k: Tensor, v: Tensor, wq: Tensor, wk: Tensor) -> Any:
        one = own(norm(gathered(q), wq))
        if dist.get_rank() == 1:
            torch._dynamo.graph_break()
        return one, own(norm(gathered(k), wk))

    return _apart(layer, LAYERS["two norms"])


def on_another_rank() -> str:
    """The error of a rank that takes another rank's graph from a cache that both use."""
    from fusion_core.dispatch.by_tokens import Runner
    from fusion_core.dispatch.plan import Plan

    rank = dist.get_rank()
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    paths = ((1, "reference.all_gather_shard"),)
    plan = Plan("all_gather_shard", ("shard",), (), {"group": group}, paths, rank=1 - rank)
    try:
        Runner(Plan.of(plan.text()))
    except fusion_core.RanksDiffer as error:
        return str(error)
    return ""


def by_a_path(name: str) -> float:
    """The largest error of a strategy as an operator runs it that picks one of several by the token count."""
    from fusion_core.dispatch.bound_pattern import BoundPattern
    from fusion_core.dispatch.path import ExecutionPath

    registry = Registry.load(FusionConfig(order=("reference",)))
    pattern = registry.patterns[name]
    (strategy,) = registry.strategies(name)
    q, k, _, wq, wk = tensors()
    given = {"x": q, "y": k, "weight": own(wq), "y_weight": own(wk)}
    names = tuple(each for each in pattern.tensors if each != "x")
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    place = BoundPattern(pattern, pattern.outputs, names, {"eps": 1e-6}, group)
    found = ExecutionPath(place, strategy)(q, [given[each] for each in names])
    exact = place.definition(q.double(), *(given[each].double() for each in names))
    return max(_largest(a, b) for a, b in zip(found, exact, strict=True))


def means_by_the_operator(agreed: bool) -> tuple[bool, bool]:
    """Whether the operator of the means leaves their sum in its argument, and whether its result is other memory."""
    from fusion_core.dispatch.by_tokens import emitted
    from fusion_core.dispatch.plan import Plan

    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    (strategy,) = Registry.load(FusionConfig(order=("reference",))).strategies("sharded_rms_norm")
    sent = MEANS["mean_square_over_ranks"]
    plan = Plan(sent.name, sent.outputs, ("part",), {"group": group}, ((1, strategy.name if agreed else None),))
    part = tensors()[0]
    means = part.square().mean(-1, keepdim=True) / dist.get_world_size()
    emitted(plan, {strategy.name: strategy}, sent)
    returned = torch.ops.fusion_core.by_tokens_1(means, [part], plan.text(), "")
    exact = gathered(part).double().square().mean(-1, keepdim=True)
    return _largest(means, exact) <= 1e-6, returned.data_ptr() != means.data_ptr()
