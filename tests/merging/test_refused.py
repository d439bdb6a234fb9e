"""What is left as it is: all_reduces that are not only added, or that something keeps apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed import _functional_collectives as funcol

from fusion_core import FusionConfig, FusionPass, Registry
from tests.corpus.case import N, norm, reduce
from tests.merging.forms import assert_unmerged, given, said, used_beside, view_of_the_last, view_on_one_side
from tests.support.graphs import describe, fuse, graph_of

pytestmark = pytest.mark.usefixtures("one_rank")

c10d = torch.ops._c10d_functional


def transposed(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + (reduce(a) + reduce(b.transpose(0, 1).contiguous().transpose(0, 1))), w)


def transposed_residual(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    """With the first result gone, the sum would take the residual's strides."""
    h = (reduce(a) + r.transpose(0, 1).contiguous().transpose(0, 1)) + reduce(b)
    return norm(h.view(-1, N), w)


REFUSED = {
    used_beside: "the result of all_reduce is also used outside the sum, needs no other use",
    transposed: "mul has other strides than mul_1, needs the same ones (x)",
    transposed_residual: "has other strides than",
}


@pytest.mark.parametrize("form", REFUSED, ids=lambda form: form.__name__)
def test_what_keeps_them_apart_is_said(merging_alone: Registry, form: Callable[..., Any]) -> None:
    fused = fuse(form, *given(), using=merging_alone)
    assert_unmerged(fused)
    assert [len(merge.nodes) for merge in fused.reports[0].merges] == [2]
    assert any(REFUSED[form].removesuffix(" (x)") in each for each in said(fused)), said(fused)
    torch.testing.assert_close(fused.results, form(*given()))


def scaled(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + (reduce(a) + 0.5 * reduce(b)), w)


def subtracted(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + (reduce(a) - reduce(b)), w)


def with_alpha(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + torch.add(reduce(a), reduce(b), alpha=2), w)


def twice(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    first = reduce(a)
    return norm(r + torch.ops.aten.add.Tensor(first, first), w)


def twice_in_one_sum(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    first = reduce(a)
    return norm((first + r) + first, w), reduce(b)


def twice_beside_another(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    first = reduce(a)
    return norm(torch.ops.aten.add.Tensor(first, first) + reduce(b), w)


def of_two_dtypes(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + (reduce(a) + reduce(b.half())), w)


def of_two_sizes(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    """One is broadcast to the other: reduced as one it would be summed at its full size, which is no gain."""
    return norm(r + (reduce(a) + reduce(b[:1])), w)


def summed_over_rows(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    """Llama 4's experts."""
    return norm(r[0] + (reduce(a).sum(0) + reduce(b[0])), w)


def the_maximum(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + (reduce(a, "max") + reduce(b, "max")), w)


def sequential(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + reduce(a)
    h = h + reduce(norm(h, w) * b)
    return norm(h, w), h


def sequential_behind_an_embedding(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
    stream = reduce(c)
    stream = stream + reduce(norm(stream, w) * a)
    stream = stream + reduce(norm(stream, w) * b)
    return norm(stream, w), stream


SILENT = (
    scaled, subtracted, with_alpha, twice, twice_in_one_sum, twice_beside_another, of_two_dtypes, of_two_sizes, summed_over_rows, the_maximum,
    sequential, sequential_behind_an_embedding,
)  # fmt: skip


@pytest.mark.parametrize("form", SILENT, ids=lambda form: form.__name__)
def test_what_is_not_only_added_is_left_alone_without_a_word(merging_alone: Registry, form: Callable[..., Any]) -> None:
    fused = fuse(form, *given(), using=merging_alone)
    assert_unmerged(fused)
    assert fused.reports[0].merges == ()
    torch.testing.assert_close(fused.results, form(*given()))


@pytest.fixture(scope="module")
def second(one_rank: str) -> Any:
    return dist.new_group([0])


def test_several_process_groups_stay_several(merging_alone: Registry, second: Any) -> None:
    def model(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
        return norm(r + (reduce(a) + funcol.all_reduce(b * 1, "sum", second)), w)

    def both(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
        return norm(r + ((reduce(a) + funcol.all_reduce(b * 1, "sum", second)) + reduce(c)), w)

    def one_after_the_other(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
        stream = reduce(a)
        return norm(stream + funcol.all_reduce(norm(stream, w) * b, "sum", second), w)

    fused = fuse(model, *given(), using=merging_alone)
    assert_unmerged(fused)
    assert said(fused) == [
        f"they are of the process groups {dist.group.WORLD.group_name}, {second.group_name}, needs one process group"
    ]
    of_three = fuse(both, *given(), using=merging_alone)
    assert [(merge.nodes, bool(merge.reasons)) for merge in of_three.reports[0].merges] == [
        (("all_reduce", "all_reduce_2"), False),
        (("all_reduce_2", "all_reduce_1"), True),  # each group's last one, which is there
    ]
    torch.testing.assert_close(of_three.results, both(*given()))
    assert fuse(one_after_the_other, *given(), using=merging_alone).reports[0].merges == ()


def test_another_shape_known_only_at_run_time(merging_alone: Registry) -> None:
    tensors = given()
    for tensor in tensors[:4]:
        torch._dynamo.mark_dynamic(tensor, 1)
    for form in (view_on_one_side, view_of_the_last):
        fused = fuse(form, *tensors, using=merging_alone)
        assert_unmerged(fused)
        assert "all_reduce has another shape, known only at run time, needs one shape" in said(fused)


@pytest.mark.parametrize("what", ["the input", "a view of the input", "what the input is a view of"])
def test_an_input_that_something_writes_into_in_between(one_rank: str, what: str) -> None:
    def model(a: Tensor, b: Tensor, r: Tensor, w: Tensor) -> Any:
        a = a * 2
        first = c10d.wait_tensor(c10d.all_reduce(a.view(2, -1, N) if "is a view" in what else a, "sum", one_rank))
        (a.view(-1) if "a view of the" in what else a).mul_(2)
        second = c10d.wait_tensor(c10d.all_reduce(b * 1, "sum", one_rank))
        return norm(r + (first.view(b.shape) + second), w), a

    graph, _ = graph_of(model, (4, N), (4, N), (4, N), (N,))
    before = describe(graph)
    report = FusionPass(FusionConfig(order=("reference",), limit=1)).run(graph)
    ((reason,),) = [merge.reasons for merge in report.merges]
    assert "mul_ writes into" in str(reason)
    plain, _ = graph_of(model, (4, N), (4, N), (4, N), (N,))
    FusionPass(FusionConfig(order=("reference",), limit=0)).run(plain)
    assert describe(plain) == before
    tensors = [torch.randn(4, N) for _ in range(3)] + [torch.randn(N)]
    torch.testing.assert_close(fx.GraphModule({}, graph)(*tensors), model(*(tensor.clone() for tensor in tensors)))


def test_what_was_written_before_it_was_reduced_is_no_hindrance(one_rank: str) -> None:
    def model(a: Tensor, b: Tensor, r: Tensor, w: Tensor) -> Any:
        a = (a * 2).mul_(3)
        first, second = (c10d.wait_tensor(c10d.all_reduce(x, "sum", one_rank)) for x in (a, b * 1))
        return norm(r + (first + second), w)

    graph, _ = graph_of(model, (4, N), (4, N), (4, N), (N,))
    report = FusionPass(FusionConfig(order=("reference",))).run(graph)
    assert [merge.reasons for merge in report.merges] == [()]
    tensors = [torch.randn(4, N) for _ in range(3)] + [torch.randn(N)]
    torch.testing.assert_close(fx.GraphModule({}, graph)(*tensors), model(*tensors))
