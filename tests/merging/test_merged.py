"""All_reduces whose results are added become one, and nothing else changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed import _functional_collectives as funcol

from fusion_core import FusionConfig, FusionPass, Registry
from fusion_core.emit.pairing import PROVENANCE
from tests.corpus.case import ADD, N, norm, reduce
from tests.dialects import vllm_operators  # noqa: F401  defines the operators
from tests.dialects.vllm_groups import vllm_groups
from tests.merging.forms import FORMS, anchors, given, residual_last
from tests.support.graphs import REFERENCE, fuse, graph_of, registry

pytestmark = pytest.mark.usefixtures("one_rank")

c10d = torch.ops._c10d_functional
aten = torch.ops.aten
MERGED = "fusion_core.merged"


@pytest.mark.parametrize("name", FORMS)
def test_results_that_are_added_are_reduced_as_one(merging_alone: Registry, name: str) -> None:
    form, merged, left = FORMS[name]
    fused = fuse(form, *given(), using=merging_alone)
    (graph,), (report,) = fused.graphs, fused.reports
    assert [(len(merge.nodes), merge.reasons) for merge in report.merges] == [(merged, ())]
    assert [node.name for node in anchors(graph)][-1] == report.merges[0].nodes[-1]
    assert len(anchors(graph)) == left
    assert sum(target is c10d.wait_tensor.default for target in fused.targets()) == left
    assert len(report.sites) == left
    torch.testing.assert_close(fused.results, form(*given()))


@pytest.mark.parametrize("name", FORMS)
def test_nothing_else_changes(merging_alone: Registry, name: str) -> None:
    """Sums in front of the all_reduce, as many additions fewer behind it, and no other node."""
    form, merged, _ = FORMS[name]
    fused = fuse(form, *given(), using=merging_alone)
    (graph,), (before,), (after,) = fused.graphs, fused.before, fused.after
    names = {row[1]: row for row in before}
    added = [node for node in graph.nodes if node.name not in names and node.op == "call_function"]
    gone = [row for row in before if row[0] == "call_function" and row[1] not in {row[1] for row in after}]
    assert [node.target for node in added if node.target is aten.add.Tensor] == (merged - 1) * [aten.add.Tensor]
    assert {node.target for node in added} <= {aten.add.Tensor, aten.reshape.default}
    assert sum(row[2] is aten.add.Tensor for row in gone) == merged - 1
    assert {row[2] for row in gone} <= {
        aten.add.Tensor, aten.reshape.default, aten.view.default, c10d.all_reduce.default, c10d.wait_tensor.default
    }  # fmt: skip
    assert all(node.meta[PROVENANCE] == MERGED for node in added)
    assert [node for node in graph.nodes if PROVENANCE in node.meta] == added
    anchor = anchors(graph)[-1]
    assert anchor.args[0] is added[-1]
    # what stays, stays as it was, but for what had a part of the sum as an argument
    kept = [(row, names[row[1]]) for row in after if len(row) > 2 and row[1] in names]
    assert all(new[2] is old[2] for new, old in kept)
    lost = {row[1] for row in gone}
    for new, old in kept:
        if new[3] != old[3]:
            assert new[1] == anchor.name or lost & set(re.findall(r"\w+", old[3])), (old, new)
    assert [new[1] for new, old in kept if new[4] != old[4]] == (["add_2"] if name == "with_biases" else [])
    assert_metadata_is_true(graph)


def assert_metadata_is_true(graph: fx.Graph) -> None:
    """Run anew, every node gives what its metadata says."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(expected := node.meta["val"], Tensor):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with expected.fake_mode:
            value = node.target(*args, **kwargs)
        assert (value.shape, value.stride(), value.dtype) == (expected.shape, expected.stride(), expected.dtype), node


@pytest.mark.parametrize("name", FORMS)
def test_the_norm_is_fused_with_the_merged_sum(name: str) -> None:
    form, merged, left = FORMS[name]
    fused = fuse(form, *given(), using=registry(REFERENCE))
    assert fused.sites[-1].pattern == ADD
    assert fused.sites[-1].strategy == f"reference.{ADD}"
    assert fused.collectives(fused.after[0]) == left
    assert fused.collectives(fused.before[0]) == left + merged - 1
    torch.testing.assert_close(fused.results, form(*given()))


def test_a_token_count_known_only_at_run_time() -> None:
    tensors = given()
    for tensor in tensors[:4]:
        torch._dynamo.mark_dynamic(tensor, 1)
    fused = fuse(residual_last, *tensors)
    assert [merge.reasons for merge in fused.reports[0].merges] == [()]
    assert fused.site.strategy == f"reference.{ADD}"
    torch.testing.assert_close(fused.results, residual_last(*tensors))


def test_an_in_place_all_reduce_in_the_graph(one_rank: str) -> None:
    def model(a: Tensor, b: Tensor, r: Tensor, w: Tensor) -> Any:
        first = c10d.wait_tensor(c10d.all_reduce_(a * 2, "sum", one_rank))
        second = c10d.wait_tensor(c10d.all_reduce_(b * 2, "sum", one_rank))
        return norm(r + (first + second), w)

    graph, _ = graph_of(model, (4, N), (4, N), (4, N), (N,))
    report = FusionPass(FusionConfig(order=("reference",))).run(graph)
    graph.lint()
    assert [merge.reasons for merge in report.merges] == [()]
    assert [site.strategy for site in report.sites] == [f"reference.{ADD}"]
    tensors = [torch.randn(4, N) for _ in range(3)] + [torch.randn(N)]
    torch.testing.assert_close(fx.GraphModule({}, graph)(*tensors), model(*tensors))


@pytest.fixture
def tp() -> Iterator[None]:
    with vllm_groups(tp_0=dist.group.WORLD) as coordinators:
        yield coordinators


@pytest.mark.usefixtures("tp")
def test_vllms_all_reduce_is_given_the_sum() -> None:
    def model(a: Tensor, b: Tensor, r: Tensor, w: Tensor) -> Any:
        first, second = (torch.ops.vllm.all_reduce(x * 2, "tp:0") for x in (a, b))
        h = r + (first + second)
        return norm(h, w), h

    tensors = (*given()[:3], given()[4])
    fused = fuse(model, *tensors, using=registry(REFERENCE))
    assert [merge.reasons for merge in fused.reports[0].merges] == [()]
    assert fused.targets().count(torch.ops.vllm.all_reduce.default) <= 1
    assert len(fused.sites) == 1
    torch.testing.assert_close(fused.results, model(*tensors))


def test_a_sum_that_is_reduced_once_more(merging_alone: Registry) -> None:
    """The input of the later ones is an addition that the first merge takes away."""

    def model(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
        world = dist.group.WORLD
        again = funcol.all_reduce(reduce(a) + reduce(b), "sum", world)
        return norm((again + reduce(c)) + r, w)

    fused = fuse(model, *given(), using=merging_alone)
    assert [merge.reasons for merge in fused.reports[0].merges] == [(), ()]
    assert len(anchors(fused.graphs[0])) == 2
    torch.testing.assert_close(fused.results, model(*given()))
