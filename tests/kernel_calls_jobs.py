"""What the workers of `test_kernel_calls` do: ranks run one graph, or rank 1 runs another."""

from __future__ import annotations

import time
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fusion_core import RanksDiffer, ops
from fusion_core.agree import kernel_calls
from fusion_core.report import history
from tests.corpus.case import EPS, norm
from tests.kernel_calls_session import (
    BETWEEN,
    EVERYWHERE,
    PATIENT,
    SHORT,
    Found,
    OnThisRank,
    Session,
    fails_late,
    fails_to_trace,
    gathered,
    given,
    model,
    ran,
    registry,
)


def alike(whole: bool, dynamic: bool) -> Found:
    """All ranks run one graph."""
    session = Session()
    call = session.compiled(registry(), whole=whole)
    for tokens in (4, 6, 3) if dynamic else (4, 4):
        session(call, tokens, dynamic)
    return session.done()


BREAKS = {
    "a graph break": BETWEEN,
    "a break in front": ("in front",),
    "a break behind": ("behind",),
    "breaks everywhere": EVERYWHERE,
}


def differing(how: str) -> Found:
    """Rank 1 differs."""
    both_ask = ("a graph break", "dynamic sizes", "a break in front", "a break behind")
    session, odd = Session(PATIENT if how in both_ask else SHORT), dist.get_rank() == 1
    own = {
        "a requirement": lambda: registry(gathered, OnThisRank(odd)),
        "a trace that fails": lambda: registry(fails_to_trace),
        "a fake that fails": lambda: registry(fails_late),
        "an order": lambda: registry(order=("reference",)) if odd else registry(),
        "a limit": lambda: registry(limit=1) if odd else registry(),
    }.get(how, registry)()
    if how == "suppressed errors" and odd:
        with torch._dynamo.config.patch(suppress_errors=True):
            session.compiled(own)  # it agrees on what it has, and then cannot compile
            call = torch.compile(model(session.group), backend=_raises)
            session(call)
    else:
        call = session.compiled(own, breaks=BREAKS.get(how, ()) if odd else (), whole=how == "a graph break")
        if how == "eager" and odd:
            call = model(session.group)
        session(call, dynamic=odd and how == "dynamic sizes")
    session(call, dynamic=odd and how == "dynamic sizes")
    return session.done()


def _raises(graph_module: Any, inputs: Any) -> Any:
    raise RuntimeError("this backend does not compile")


def both_take_other_graphs(changed: bool) -> Found:
    """A graph that ranks agree on, then one that differs, then the first one again: unfused by now on both ranks."""
    session, odd = Session(), dist.get_rank() == 1
    first = session.compiled(registry())
    session(first)
    session(session.compiled(registry(), breaks=BETWEEN if odd and changed else ()), 6)
    session(first)
    return session.done()


def one_takes_another_graph() -> Found:
    """After a graph that ranks agreed on, one rank alone takes another: it must raise, for the other is in a kernel."""
    session, odd = Session(), dist.get_rank() == 1
    first = session.compiled(registry())
    session(first)
    if odd:
        other = session.compiled(registry(), breaks=BETWEEN)
        session.limit = SHORT
        try:
            session(other)
        except RanksDiffer as error:
            session.found.raised = str(error)
        x, residual, weight = given(1)  # what the other rank waits for inside of its kernels
        name = session.group.group_name
        normed, _ = gathered(x * 1, residual, weight, EPS, name)
        gathered(normed * 0.5, residual, weight, EPS, name)
    else:
        session(first)
    return session.done()


def interrupted(times: int) -> Found:
    """Rank 1 is interrupted while it waits, and tries again."""
    session, odd = Session(), dist.get_rank() == 1
    call = session.compiled(registry())
    if odd:
        looks = iter(range(1000))

        def interrupt(seconds: float) -> None:
            if next(looks) < times:
                raise KeyboardInterrupt
            time_sleep(seconds)

        time_sleep = time.sleep
        for _ in range(times):
            with mock.patch("fusion_core.agree.agreement.time.sleep", interrupt):
                try:
                    session(call)
                except KeyboardInterrupt:
                    continue
                break
        if len(session.found.errors) == 0:
            session(call)
    else:
        time.sleep(1.0)
        session(call)
    return session.done()


def by_hand(differ: bool) -> Found:
    """The eager function of the pattern, where rank 1 may take another strategy."""
    session, odd = Session(SHORT if differ else PATIENT), dist.get_rank() == 1
    x, residual, weight = given(dist.get_rank())
    name = session.group.group_name
    own = registry(gathered, OnThisRank(differ and odd))
    exactly = exact_sum()
    with (
        mock.patch.object(ops, "_registry_for", return_value=own),
        mock.patch.object(kernel_calls, "TIMEOUT", session.limit),
        warnings.catch_warnings(record=True) as warned,
        torch.no_grad(),
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            ran.clear()
            results = ops.all_reduce_add_rms_norm(x, residual, weight, EPS, group=name)
            session.found.ran.append(len(ran))
            off = (float((a.double() - b).abs().max()) for a, b in zip(results, exactly, strict=True))
            session.found.errors.append(max(off))
    session.found.warned = [str(each.message) for each in warned]
    return session.done()


def exact_sum() -> tuple[Tensor, Tensor]:
    tensors = [given(rank) for rank in range(dist.get_world_size())]
    h = tensors[0][1].double() + sum(x.double() for x, *_ in tensors)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * tensors[0][2].double(), h


def side_by_side(break_on_one: bool) -> Found:
    """Attention and MLP side by side, by ``torch.compile(backend="fusion_core")`` as users call it; nothing set."""
    odd, found = dist.get_rank() == 1, Found()

    def block(x: Tensor, y: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        attention = funcol.all_reduce(x * 1, "sum", dist.group.WORLD)
        if odd and break_on_one:
            torch._dynamo.graph_break()
        mlp = funcol.all_reduce(y * 2, "sum", dist.group.WORLD)
        hidden = residual + (attention + mlp)
        return hidden + funcol.all_reduce(norm(hidden, weight) * y, "sum", dist.group.WORLD)

    x, residual, weight = given(dist.get_rank())
    y = x.flip(0) + 1
    torch._dynamo.reset()
    with torch.no_grad(), history.collecting() as reports:
        wanted = block(x, y, residual, weight)
        compiled = torch.compile(block, backend="fusion_core")
        for _ in range(2):
            found.errors.append(float((compiled(x, y, residual, weight) - wanted).abs().max()))
    found.sites = [(site.pattern, site.strategy) for report in reports for site in report.sites]
    dist.barrier()
    return found


def one_is_configured_anew() -> Found:
    """After a graph that ranks agreed on, one rank alone takes another configuration."""
    session, odd = Session(), dist.get_rank() == 1
    first = session.compiled(registry())
    session(first)
    if odd:
        session.limit = SHORT
        try:
            session.compiled(registry(limit=1))
        except RanksDiffer as error:
            session.found.raised = str(error)
    return session.done()
