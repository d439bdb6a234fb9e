"""What a dry run promises is what a compilation does: each strategy is placed in a copy of the graph."""

import re
from typing import Any

import pytest
import torch
from torch import fx

from fusion_core import FusionPass, Report, Stage, Strategy, explain
from fusion_core._torch.inductor import post_grad_only
from fusion_core.dispatch import by_tokens
from fusion_core.dispatch.strides import fake_results
from tests.acme import acme, opaque
from tests.support.graphs import REFERENCE, describe, registry
from tests.test_matching import ADD, norm, reduce, tensors

pytestmark = pytest.mark.usefixtures("one_rank")


def two_layers(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    first = r + reduce(x)
    last = first + reduce(norm(first, w))
    return norm(last, w), last


def test_a_strategy_that_only_fails_when_it_is_placed_is_not_promised(monkeypatch: Any) -> None:
    """The fake of a plugin's own pattern is the plugin's code, and runs when its operator is traced and when it is placed."""
    calls: list[Any] = []

    def once(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise RuntimeError("once is enough")
        return fake_results(*args)

    monkeypatch.setattr(by_tokens, "fake_results", once)
    late = Strategy(ADD, "acme.late", opaque, outputs=("normed", "residual_out"))
    using = registry(acme(monkeypatch, late), REFERENCE)
    found: list[tuple[Report, bool, Report]] = []

    def look(graph: fx.Graph) -> None:
        before = describe(graph)
        calls.clear()
        dry = FusionPass(registry=using, dry_run=True).run(graph)
        unchanged = describe(graph) == before
        calls.clear()
        found.append((dry, unchanged, FusionPass(registry=using).run(graph)))

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(two_layers, backend=post_grad_only(look))(*tensors())
    ((dry, unchanged, real),) = found
    assert unchanged
    assert [site.strategy for site in dry.sites] == [f"reference.{ADD}"] * 2
    for site in dry.sites:
        (refused,) = [decision for decision in site.decisions if decision.strategy == "acme.late"]
        assert refused.stage is Stage.REPLACEMENT
        assert "placing acme.late raised RuntimeError: once is enough" in str(refused.reasons[0])
    assert dry.sites == real.sites


@pytest.mark.parametrize(
    ("dynamic", "marked", "sizes"), [(None, False, 0), (None, True, 1), (False, False, 0), (True, False, 3)]
)
def test_explain_takes_sizes_for_symbols_where_torch_compile_does(
    dynamic: bool | None, marked: bool, sizes: int
) -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return norm(r + reduce(x), w, 1e-5)

    given = tensors()
    if marked:
        for tensor in given[:2]:
            torch._dynamo.mark_dynamic(tensor, 1)
    with torch.no_grad():
        (site,) = explain(model, *given, dynamic=dynamic).sites
    assert site.strategy == f"reference.{ADD}"
    text = site.attributes["inputs"]["x"]
    assert len(re.findall(r"\bs\d+", text)) == sizes, text
