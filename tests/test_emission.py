"""What the pass does to a graph: the chosen strategy in, every node of the site out, and nothing else."""

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fusion_core import Contiguous, DType, FusionConfig, FusionPass, Registry, Stage, Strategy
from fusion_core.dispatch import by_tokens
from fusion_core.dispatch.plan import Plan
from fusion_core.dispatch.strides import fake_results
from tests.acme import KERNEL, acme, opaque
from tests.support.graphs import REFERENCE, describe, fuse, graph_of, registry
from tests.test_matching import ADD, add_then, norm, reduce, tensors

pytestmark = pytest.mark.usefixtures("one_rank")

c10d = torch.ops._c10d_functional


def test_a_kernel_replaces_every_node_of_the_site(monkeypatch: Any) -> None:
    given = tensors()
    fused = fuse(add_then(norm), *given, using=registry(acme(monkeypatch, KERNEL), REFERENCE))
    assert fused.site.strategy == "acme.add"
    names = [str(target) for target in fused.targets()]
    (kernel,) = (node for node in fused.graphs[0].nodes if node.target is torch.ops.fusion_core.by_tokens_2.default)
    assert Plan.of(kernel.args[2]).paths == ((1, "acme.add"),)
    assert not [name for name in names if "_c10d_functional" in name or "rsqrt" in name or "aten.add" in name]
    torch.testing.assert_close(fused.results, add_then(norm)(*given))
    assert kernel.meta["val"][0].shape == given[0].shape


@torch.library.custom_op("fusion_core_tests::broken", mutates_args=())
def broken(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("no memory for the workspace")


@broken.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: Any, eps: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def test_an_operator_that_raises_when_it_runs_is_named_in_a_group_of_one_rank_too(monkeypatch: Any) -> None:
    kernel = Strategy(ADD, "acme.broken", broken, outputs=("normed", "residual_out"))
    with pytest.raises(RuntimeError, match="no memory for the workspace") as caught:
        fuse(add_then(norm), *tensors(), using=registry(acme(monkeypatch, kernel), REFERENCE))
    (note,) = caught.value.__notes__
    assert note.startswith("fusion_core ran acme.broken at ")
    assert "FUSION_CORE_ORDER" in note


@pytest.mark.parametrize("error", [RuntimeError("late"), SystemExit(3)], ids=["raises", "exits"])
def test_an_operator_whose_fake_fails_only_when_it_is_placed_leaves_the_graph_as_it_was(
    monkeypatch: Any, error: BaseException
) -> None:
    """The fake of a plugin's own pattern is the plugin's code."""
    calls: list[Any] = []

    def late(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            raise error
        return fake_results(*args)

    monkeypatch.setattr(by_tokens, "fake_results", late)
    given = tensors()
    fused = fuse(add_then(norm), *given, using=registry(acme(monkeypatch, KERNEL), REFERENCE))
    assert fused.site.strategy == f"reference.{ADD}"
    (decision,) = (each for each in fused.site.decisions if each.strategy == "acme.add")
    assert f"placing acme.add raised {type(error).__name__}" in str(decision.reasons[0])
    torch.testing.assert_close(fused.results, add_then(norm)(*given))


def test_an_operator_that_a_function_calls_is_not_in_the_graph_itself(monkeypatch: Any) -> None:
    """The function may be what registers it, and a graph from the compile cache runs where nothing was traced."""

    def calls(x: Any, residual: Any, weight: Any, eps: float, group: str) -> Any:
        return opaque(x, residual, weight, eps, group)

    late = Strategy(ADD, "acme.late", calls, outputs=("normed", "residual_out"))
    given = tensors()
    fused = fuse(add_then(norm), *given, using=registry(acme(monkeypatch, late), REFERENCE))
    assert fused.site.strategy == "acme.late"
    assert opaque._opoverload not in fused.targets()
    torch.testing.assert_close(fused.results, add_then(norm)(*given), rtol=0.02, atol=0.02)


def test_as_many_collectives_run_as_before() -> None:
    fused = fuse(add_then(norm), *tensors())
    assert fused.site.strategy == f"reference.{ADD}"
    assert fused.collectives(fused.before[0]) == fused.collectives(fused.after[0]) == 1
    assert sum(target is c10d.wait_tensor.default for target in fused.targets()) == 1


def test_an_output_that_no_kernel_gives_keeps_it_out(monkeypatch: Any) -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        total = r + (reduced := reduce(x))
        return norm(total, w), reduced

    fused = fuse(model, *tensors(), using=registry(acme(monkeypatch, KERNEL), REFERENCE))
    assert fused.site.strategy == f"reference.{ADD}"
    refused = next(d for d in fused.site.decisions if d.strategy == "acme.add")
    assert refused.stage is Stage.REQUIRES
    assert "reduced is used outside the site" in str(refused.reasons[0])


def test_a_scalar_that_a_kernel_does_not_take_keeps_it_out(monkeypatch: Any) -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return norm(r + reduce(x), 1 + w)

    fused = fuse(model, *tensors(), using=registry(acme(monkeypatch, KERNEL)))
    assert fused.site.strategy is None
    refused = next(d for d in fused.site.decisions if d.strategy == "acme.add")
    assert [str(reason) for reason in refused.reasons] == ["weight_bias is 1.0, needs 0.0"]
    assert fused.before == fused.after


@torch.library.custom_op("fusion_core_tests::weighted", mutates_args=())
def weighted(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group: str) -> torch.Tensor:
    """A kernel that needs a weight; torch would hand it None all the same."""
    return opaque(x, residual, weight, eps, group)[0]


@weighted.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group: str) -> torch.Tensor:
    return torch.empty_like(x)


def _weighted(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group: str) -> torch.Tensor:
    return weighted(x, residual, weight, eps, group)


@pytest.mark.parametrize(
    "impl", [weighted, torch.ops.fusion_core_tests.weighted.default, _weighted], ids=["op", "overload", "function"]
)
def test_a_kernel_that_needs_a_weight_is_not_given_none(monkeypatch: Any, impl: Any) -> None:
    using = registry(acme(monkeypatch, Strategy(ADD, "acme.weighted", impl, outputs=("normed",))))
    assert fuse(lambda x, r, w: norm(r + reduce(x), w), *tensors(), using=using).site.strategy == "acme.weighted"
    without = fuse(lambda x, r, w: norm(r + reduce(x), None), *tensors(), using=using)
    assert without.site.strategy is None
    refused = next(d for d in without.site.decisions if d.strategy == "acme.weighted")
    assert [str(reason) for reason in refused.reasons] == ["there is no weight, needs one"]


def _wrong_dtype(x: torch.Tensor, residual: torch.Tensor, weight: Any, eps: float, group: str) -> Any:
    normed, total = opaque(x, residual, weight, eps, group)
    return normed.float(), total


def _raises(x: torch.Tensor, residual: torch.Tensor, weight: Any, eps: float, group: str) -> Any:
    raise RuntimeError("no kernel for a Tuesday")


def _holds_a_tensor(x: torch.Tensor, residual: torch.Tensor, weight: Any, eps: float, group: str) -> Any:
    return opaque(x, residual * torch.tensor([1.0]), weight, eps, group)


@pytest.mark.parametrize(
    ("impl", "why"),
    [
        (_wrong_dtype, "gives normed as float32[2, 3, 16]"),
        (_raises, "no kernel for a Tuesday"),
    ],
)
def test_a_strategy_that_cannot_be_placed_gives_way_to_the_next(monkeypatch: Any, impl: Any, why: str) -> None:
    broken = Strategy(ADD, "acme.broken", impl, outputs=("normed", "residual_out"))
    given = tensors()
    fused = fuse(add_then(norm), *given, using=registry(acme(monkeypatch, broken), REFERENCE))
    assert fused.site.strategy == f"reference.{ADD}"
    refused = next(d for d in fused.site.decisions if d.strategy == "acme.broken")
    assert refused.stage is Stage.REPLACEMENT
    assert why in str(refused.reasons[0])
    torch.testing.assert_close(fused.results, add_then(norm)(*given), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("how", ["limit=0", "order=()", "every backend refuses"])
def test_where_nothing_is_chosen_the_graph_stays_node_for_node(monkeypatch: Any, how: str) -> None:
    refusing = Strategy(
        ADD, "acme.add", opaque, requires=(DType("x", torch.float64),), outputs=("normed", "residual_out")
    )
    using = {
        "limit=0": lambda: registry(REFERENCE, config=FusionConfig(limit=0)),
        "order=()": lambda: registry(REFERENCE, config=FusionConfig(order=())),
        "every backend refuses": lambda: registry(acme(monkeypatch, refusing)),
    }[how]()
    fused = fuse(add_then(norm), *tensors(), using=using)
    assert fused.sites
    assert not fused.reports[0].fused
    assert fused.before == fused.after


def test_limit_rewrites_the_first_sites_only() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        first = r + reduce(x)
        second = first + reduce(norm(first, w))
        return norm(second, w)

    fused = fuse(model, *tensors(), config=FusionConfig(limit=1))
    assert [site.strategy for site in fused.sites] == [f"reference.{ADD}", None]
    late = next(d for d in fused.sites[1].decisions if d.strategy == f"reference.{ADD}")
    assert str(late.reasons[0]) == "limit is 1 rewrites, needs a higher limit"


def test_a_dry_run_changes_nothing_and_says_what_it_would_do() -> None:
    own = FusionPass(dry_run=True)
    found = []

    def look(graph: fx.Graph) -> None:
        before = describe(graph)
        found.append((own.run(graph), before == describe(graph)))

    from fusion_core._torch.inductor import CustomGraphPass, post_grad_only

    class Look(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            look(graph)

        def uuid(self) -> None:
            return None

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    torch._dynamo.reset()
    torch.compile(add_then(norm), backend=post_grad_only(Look()))(*tensors())
    ((report, unchanged),) = found
    assert unchanged
    assert report.origin == "explained"
    assert report.sites[0].strategy == f"reference.{ADD}"
    assert "would be on a kernel, 1 as before (reference)" in str(report)


def test_a_late_weight_is_moved_up_to_the_site(monkeypatch: Any) -> None:
    """A use of the sum stands before the weight's cast: the cast is moved, and nothing is used before it is there."""

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        total = r + reduce(x)
        early = total.view(-1) * 2
        return norm(total, torch.tanh(w)), early

    given = tensors()
    fused = fuse(model, *given, using=registry(acme(monkeypatch, KERNEL)))
    assert fused.site.strategy == "acme.add"
    torch.testing.assert_close(fused.results, model(*given))


def test_a_residual_that_comes_after_a_use_of_the_sum_is_moved_up(monkeypatch: Any) -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        reduced = reduce(x)
        early = torch.tanh(reduced)
        return norm(torch.sigmoid(r) + reduced, w), early

    given = tensors()
    fused = fuse(model, *given)
    assert fused.site.strategy == f"reference.{ADD}"
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def test_an_in_place_all_reduce_of_a_value_of_its_own_is_a_site(one_rank: str) -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        reduced = c10d.wait_tensor(c10d.all_reduce_(x * 2, "sum", one_rank))
        return norm(r + reduced, w)

    graph, _ = graph_of(model, (4, 16), (4, 16), (16,))
    report = FusionPass().run(graph)
    graph.lint()
    assert report.sites[0].strategy == f"reference.{ADD}"
    assert not [node for node in graph.nodes if node.target is c10d.all_reduce_.default]


def test_an_in_place_all_reduce_of_an_input_is_left_alone(one_rank: str) -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return norm(r + c10d.wait_tensor(c10d.all_reduce_(x, "sum", one_rank)), w)

    graph, _ = graph_of(model, (4, 16), (4, 16), (16,))
    before = describe(graph)
    site = FusionPass().run(graph).sites[0]
    assert site.strategy is None
    assert "writes into" in str(site.decisions[0].reasons[0])
    assert describe(graph) == before


@pytest.mark.parametrize("what", ["the sum", "the residual"])
def test_a_value_that_something_writes_into_is_left_alone(one_rank: str, what: str) -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        reduced = c10d.wait_tensor(c10d.all_reduce(x, "sum", one_rank))
        if what == "the residual":
            r.view(-1).mul_(2)  # through a view: the graph's add then reads the input itself
        total = r + reduced
        if what == "the sum":
            total.view(-1).mul_(2)
        return norm(total, w), total

    graph, _ = graph_of(model, (4, 16), (4, 16), (16,))
    site = FusionPass().run(graph).sites[0]
    assert site.pattern == "all_reduce"
    reasons = [str(reason) for d in site.decisions if d.pattern == ADD for reason in d.reasons]
    assert any("writes into" in reason for reason in reasons), reasons


def test_an_all_reduce_in_a_group_nobody_knows_is_a_site_with_a_refusal() -> None:
    graph = fx.Graph()
    mode = FakeTensorMode()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty(4, 16)
    reduced = graph.call_function(c10d.all_reduce.default, (x, "sum", "nowhere"))
    waited = graph.call_function(c10d.wait_tensor.default, (reduced,))
    reduced.meta["val"] = waited.meta["val"] = x.meta["val"]
    graph.output((waited,))
    site = FusionPass(registry=registry(REFERENCE)).run(graph).sites[0]
    assert site.strategy is None
    assert any("'nowhere', which this process does not know" in str(r) for d in site.decisions for r in d.reasons)


def test_training_gives_the_same_gradients_and_says_why_the_norm_is_not_fused() -> None:
    x, r, w = (t.float() for t in tensors())

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return norm(r + reduce(torch.tanh(x)), w)

    gradients = []
    for config in (FusionConfig(order=()), FusionConfig()):
        leaves = [t.clone().requires_grad_() for t in (x, r, w)]
        fused = fuse(model, *leaves, config=config, grad=True)
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
    forward = fused.reports[0].sites[0]
    reasons = [str(reason) for d in forward.decisions if d.pattern == ADD for reason in d.reasons]
    assert forward.pattern == ADD or any("inside the chain is used by output" in reason for reason in reasons), reasons


def test_a_strided_input_is_seen_with_its_strides(monkeypatch: Any) -> None:
    strict = Strategy(ADD, "acme.add", opaque, requires=(Contiguous("residual"),), outputs=("normed", "residual_out"))
    using = registry(acme(monkeypatch, strict))
    x, r, w = tensors(torch.float32, 3, 3)
    assert fuse(add_then(norm), x, r, w, using=using).site.strategy == "acme.add"
    assert fuse(add_then(norm), x, r.transpose(0, 1), w, using=using).site.strategy is None


def test_a_registry_of_nothing_leaves_everything_alone() -> None:
    fused = fuse(add_then(norm), *tensors(), using=Registry.of([], FusionConfig()))
    assert fused.before == fused.after
    assert "no backend is in use" in str(fused.reports[0])
