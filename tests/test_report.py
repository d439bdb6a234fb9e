"""What a person and a program read of the decisions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_core import Decision, Reason, Report, SiteReport, Stage, explain
from tests.acme import KERNEL, acme, opaque
from tests.support.graphs import REFERENCE, fuse, plugin, registry
from tests.test_matching import ADD, add_then, norm, reduce, tensors

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def report(monkeypatch: Any) -> Report:
    from fusion_core import DType, Strategy

    picky = Strategy(
        ADD, "acme.picky", opaque, requires=(DType("x", torch.float16),), outputs=("normed", "residual_out")
    )
    absent = plugin(monkeypatch, "absent", fusion_available=lambda device: [Reason("driver", "found no driver", "one")])
    return fuse(add_then(norm), *tensors(), using=registry(acme(monkeypatch, picky), absent, REFERENCE)).reports[0]


def test_the_text_has_a_line_a_site_and_the_reason_of_each_refusal(report: Report) -> None:
    lines = str(report).splitlines()
    assert lines[0] == "fusion_core: 0 of 1 all_reduces on a kernel, 1 as before (reference), on 1 x cpu"
    assert lines[2].split() == (
        f"all_reduce {ADD} -> reference.{ADD} x bfloat16[2, 3, 16], eps 1e-05, live normed + residual_out".split()
    )
    assert "  acme.picky [requires]: x is bfloat16, needs float16 (at all_reduce)" in lines
    assert "  absent: found no driver, needs one" in lines


def test_every_strategy_of_every_pattern_has_a_decision(report: Report) -> None:
    from fusion_core.patterns import CORE_PATTERNS

    decided = {decision.strategy for decision in report.sites[0].decisions}
    of_sums = {"symm_mem_one_shot", "symm_mem_two_shot", "all_reduce_in_rank_order"}
    names = of_sums | {pattern.name for pattern in CORE_PATTERNS if pattern.collective == "all_reduce"}
    assert decided == {"acme.picky", *(f"reference.{name}" for name in names)}
    assert [d.strategy for d in report.sites[0].decisions if d.stage is Stage.CHOSEN] == [f"reference.{ADD}"]
    assert all(d.reasons for d in report.sites[0].decisions if d.stage is not Stage.CHOSEN)


def test_a_kernel_that_comes_first_outranks_the_reference_with_the_way_to_turn_it_round(monkeypatch: Any) -> None:
    fused = fuse(add_then(norm), *tensors(), using=registry(acme(monkeypatch, KERNEL), REFERENCE))
    late = next(d for d in fused.site.decisions if d.strategy == f"reference.{ADD}")
    assert late.stage is Stage.OUTRANKED
    assert str(late.reasons[0]) == "acme.add comes first; order=('reference',) chooses it"


def test_a_report_goes_to_json_and_back(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    again = Report.from_dict(data)
    assert again.to_dict() == data
    assert str(again) == str(report)
    assert again.fused[0].decisions == report.sites[0].decisions


def test_a_report_of_another_schema_is_an_error() -> None:
    with pytest.raises(ValueError, match="schema 99, needs 3"):
        Report.from_dict({"schema": 99})


def test_the_page_holds_every_decision_escaped_and_replaces_a_file_as_a_whole(report: Report, tmp_path: Path) -> None:
    from dataclasses import replace

    odd = SiteReport(
        "all_reduce", None, "<node>", {}, (Decision("all_reduce", "a.b", Stage.REQUIRES, (Reason("c", "<&>"),)),)
    )
    path = tmp_path / "report.html"
    path.write_text("old")
    replace(report, sites=(*report.sites, odd)).to_html(path)
    page = path.read_text()
    assert "&lt;node&gt;" in page
    assert "&lt;&amp;&gt;" in page
    assert "<node>" not in page
    assert "x is bfloat16, needs float16" in page
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_a_backend_that_does_not_load_is_named_in_every_report(monkeypatch: Any) -> None:
    broken = plugin(monkeypatch, "broken", fusion_strategies=lambda: 1 / 0)
    with pytest.warns(RuntimeWarning, match="'broken' not loaded"):
        using = registry(broken, REFERENCE)
    report = fuse(add_then(norm), *tensors(), using=using).reports[0]
    assert "  backend 'broken' not loaded: ZeroDivisionError: division by zero" in str(report).splitlines()


def test_a_graph_without_an_all_reduce_says_so() -> None:
    fused = fuse(lambda x: x + 1, torch.ones(2))
    assert str(fused.reports[0]) == "fusion_core: no all_reduce in this graph on cpu, nothing to fuse"
    assert fused.before == fused.after


def test_explain_covers_every_graph_of_a_model_and_leaves_it_uncompiled() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        first = norm(r + reduce(x), w)
        torch._dynamo.graph_break()
        return norm(first + reduce(first), w)

    given = tensors()
    with torch.no_grad():
        report = explain(model, *given)
    assert report.origin == "explained"
    assert [site.pattern for site in report.sites] == [ADD, ADD]
    assert str(report).startswith(
        "fusion_core: dry run: nothing was changed; 0 of 2 all_reduces would be on a kernel, 2 as before (reference), "
        "in 2 graphs, on 1 x cpu"
    )


def test_explain_says_the_same_however_often_it_is_asked_and_uses_up_nothing_of_the_model() -> None:
    """Dynamo gives up on code that was compiled too often, and then runs it eagerly: a wrong "nothing to fuse"."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
            return norm(r + reduce(x), w)

    model = Model()
    with torch.no_grad():
        for _ in range(torch._dynamo.config.recompile_limit + 1):
            assert len(explain(model, *tensors()).fused) == 1
        compiled = torch.compile(model, backend="fusion_core", fullgraph=True)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            compiled(*tensors())
        assert len(explain(compiled, *tensors()).fused) == 1


def test_explain_of_one_model_does_not_hang_on_another() -> None:
    """Dynamo remembers by code that a number has differed, and hands it in as a tensor from then on."""

    class Model(torch.nn.Module):
        def __init__(self, eps: float) -> None:
            super().__init__()
            self.eps = eps

        def forward(self, x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
            return norm(r + reduce(x), w, self.eps)

    with torch.no_grad():
        for eps in (1e-5, 1e-6, 1e-4):
            (site,) = explain(Model(eps), *tensors()).sites
            assert (site.pattern, site.attributes["eps"]) == (ADD, eps)


def test_explain_of_a_model_without_collectives_says_so() -> None:
    with torch.no_grad():
        assert "no all_reduce" in str(explain(torch.nn.Linear(2, 2), torch.ones(1, 2)))


def test_variants_of_a_strategy_that_are_refused_alike_are_one_line():
    narrow, wide = Reason("dtype", "weight is float32", "bfloat16"), Reason("world_size", "world size is 3", "2")
    decisions = (
        Decision("all_reduce", "acme.sum", Stage.REQUIRES, (narrow,)),
        Decision("all_reduce", "acme.sum_fast", Stage.REQUIRES, (narrow,)),
        Decision("all_reduce", "acme.sum_wide", Stage.REQUIRES, (narrow, wide)),
        Decision("all_reduce", "acme.sum_other", Stage.REQUIRES, (wide,)),
        Decision("all_reduce", "other.sum", Stage.REQUIRES, (narrow,)),
    )
    lines = str(Report(sites=(SiteReport("all_reduce", None, "all_reduce", {}, decisions),))).splitlines()
    said = [line.split(":")[0].strip() for line in lines if "[requires]" in line]
    assert said == ["acme.sum [requires]", "acme.sum_other [requires]", "other.sum [requires]"]
