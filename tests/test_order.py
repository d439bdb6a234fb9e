"""All_reduces stay in the order in which the model calls them: a rank whose graph breaks in between runs them so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_core import FusionPass
from fusion_core.emit.pairing import is_collective
from fusion_core.lift.collectives import TARGETS
from tests.acme import KERNEL, acme, opaque
from tests.corpus.case import ADD, N, norm, reduce
from tests.support.graphs import REFERENCE, fuse, registry

c10d = torch.ops._c10d_functional

pytestmark = pytest.mark.usefixtures("one_rank")


def first_with_the_other_as_residual(a: Tensor, b: Tensor, w: Tensor) -> Any:
    first, second = reduce(a), reduce(b)
    h = first + second.abs()  # the norm's chain begins at the first one, and its residual comes of the second
    return norm(h, w), h, second


def given() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return *(torch.randn(3, N, generator=generator) for _ in range(2)), torch.randn(N, generator=generator)


@pytest.mark.parametrize("kernel", [False, True], ids=["the definition", "a kernel"])
def test_no_all_reduce_moves_behind_a_later_one(monkeypatch: Any, kernel: bool) -> None:
    using = [acme(monkeypatch, KERNEL), REFERENCE] if kernel else [REFERENCE]
    fused = fuse(first_with_the_other_as_residual, *given(), using=registry(*using))
    placed = [node for node in fused.graphs[0].nodes if node.target in TARGETS]
    assert [node.args[0].name for node in placed] == ["mul", "mul_1"]
    refusals = [str(reason) for d in fused.sites[0].decisions for reason in d.reasons if reason.code == "order"]
    assert len(refusals) == 1 + kernel
    assert all("all_reduce would come after all_reduce_1, which the model calls later" in each for each in refusals)
    torch.testing.assert_close(fused.results, first_with_the_other_as_residual(*given()))


def two_towers(a: Tensor, b: Tensor, w: Tensor) -> Any:
    """Inductor puts what makes a residual right before its use, and so behind both all_reduces; the weight as well."""
    first, second = reduce(a), reduce(b)
    weight = torch.tanh(w)
    h, k = torch.sigmoid(a) + first, b + second
    return norm(h, weight), h, norm(k, weight), k


@pytest.mark.parametrize("kernel", [False, True], ids=["the definition", "a kernel"])
def test_what_a_site_needs_late_is_moved_before_the_next_all_reduce(monkeypatch: Any, kernel: bool) -> None:
    using = [acme(monkeypatch, KERNEL), REFERENCE] if kernel else [REFERENCE]
    fused = fuse(two_towers, *given(), using=registry(*using))
    late = [row[1] for row in fused.before[0] if row[0] == "call_function"]
    assert late.index("sigmoid") > late.index("all_reduce_1")
    assert [site.strategy for site in fused.sites] == ["acme.add" if kernel else f"reference.{ADD}"] * 2
    torch.testing.assert_close(fused.results, two_towers(*given()))


def test_what_a_site_needs_late_stays_behind_a_write_into_what_it_reads(one_rank: str) -> None:
    def model(a: Tensor, b: Tensor, w: Tensor) -> Any:
        first = c10d.all_reduce(a * 2, "sum", one_rank)
        second = c10d.all_reduce(b * 2, "sum", one_rank)
        a.view(-1).copy_(b.view(-1))
        h = torch.sigmoid(a) + c10d.wait_tensor(first)
        return norm(h, w), h, c10d.wait_tensor(second)

    graph = make_fx(model)(*given()).graph
    site, _ = FusionPass(registry=registry(REFERENCE)).run(graph).sites
    assert "all_reduce would come after all_reduce_1" in str([reason for d in site.decisions for reason in d.reasons])
    found = torch.fx.GraphModule({}, graph)(*given())
    torch.testing.assert_close(found, model(*given()))


def test_a_collective_of_another_library_is_not_moved_for_a_site_that_needs_its_result(one_rank: str) -> None:
    def model(a: Tensor, b: Tensor, w: Tensor) -> Any:
        first = reduce(a)
        h = first + opaque(b, b, w, 1e-5, one_rank)[1]
        return norm(h, w), h

    fused = fuse(model, *given(), using=registry(REFERENCE))
    called = [str(node.target).split(".")[1] for node in fused.graphs[0].nodes if is_collective(node)]
    assert [name.rstrip("_") for name in called] == ["all_reduce", "add_rms_norm"]
    assert "would come after add_rms_norm" in str([reason for d in fused.site.decisions for reason in d.reasons])
    torch.testing.assert_close(fused.results, model(*given()))
