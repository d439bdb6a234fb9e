"""Places whose token count is known only at run time: what is chosen for which count, and what then runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

import fusion_core
from fusion_core import FusionConfig, Report, Stage, Strategy
from fusion_core.dispatch import named
from fusion_core.dispatch.plan import Plan
from tests.support.graphs import fuse
from tests.test_matching import ADD, add_then, norm
from tests.token_counts import FEW, HIDDEN, OUTPUTS, Dynamic, Rows, acme, few, given, many, model, own_sum, ran, table

pytestmark = pytest.mark.usefixtures("one_rank")


def test_one_graph_runs_what_was_chosen_for_each_count(monkeypatch: Any) -> None:
    dynamic = Dynamic(model, acme(monkeypatch, few(Rows(0, 8)), many(Rows(8, 100))))
    assert [dynamic(rows) for rows in (2, 8, 9, 100, 101, 3)] == [
        ["few"], ["few"], ["many"], ["many"], [], ["few"],
    ]  # fmt: skip
    (report,) = dynamic.reports
    (site,) = report.sites
    assert [(choice.first, choice.strategy) for choice in site.choices] == [
        (1, "acme.few"), (9, "acme.many"), (101, f"reference.{ADD}"),
    ]  # fmt: skip
    assert site.strategy == "acme.few"
    stages = {d.strategy: d.stage for d in site.decisions if d.pattern == ADD}
    assert stages == {"acme.few": Stage.CHOSEN, "acme.many": Stage.CHOSEN, f"reference.{ADD}": Stage.CHOSEN}
    line = f"from 1: acme.few; from 9: acme.many; from 101: reference.{ADD}"
    assert f"  {ADD}: by the tokens of each call; {line} (at all_reduce)" in str(report).splitlines()
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.sites[0].choices == site.choices


def test_what_runs_at_every_count_is_all_that_the_graph_has_to_run(monkeypatch: Any) -> None:
    dynamic = Dynamic(model, acme(monkeypatch, few()))
    assert dynamic(3) == ["few"]
    plans = dynamic.plans()
    assert plans
    assert all((plan.paths, plan.asks) == (((1, "acme.few"),), ()) for plan in plans)


def test_where_nothing_pays_the_definition_is_left_to_inductor(monkeypatch: Any) -> None:
    dynamic = Dynamic(model, acme(monkeypatch, few(Rows(-2, -1))))
    assert dynamic(3) == []
    (site,) = dynamic.reports[0].sites
    assert site.strategy == f"reference.{ADD}"
    refused = next(d for d in site.decisions if d.strategy == "acme.few")
    assert (refused.stage, str(refused.reasons[0])) == (Stage.WORTHWHILE, "1 rows, needs -1 to -1")


def test_the_unfused_path_reduces_in_place_only_what_nobody_else_reads(monkeypatch: Any) -> None:
    def summed(x: Tensor, r: Tensor, w: Tensor) -> Any:
        total = funcol.all_reduce(x, "sum", torch.distributed.group.WORLD) + r
        return norm(total, w), total

    def of_its_own(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return summed(x * 2, r, w)

    def read_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
        y = x * 2
        return *summed(y, r, w), y + 1

    def added_to_itself(x: Tensor, r: Tensor, w: Tensor) -> Any:
        y = x * 2
        return summed(y, y, w)

    for function, copies in ((of_its_own, 0), (read_later, 1), (summed, 1), (added_to_itself, 0)):
        dynamic = Dynamic(function, acme(monkeypatch, few(Rows(0, 4))))
        assert [dynamic(rows) for rows in (2, 7)] == [["few"], []]
        targets = [str(node.target) for node in dynamic.graphs[0].nodes]
        assert "fusion_core.by_tokens_2.default" in targets
        assert sum("clone" in target or "empty_strided" in target for target in targets) == copies, targets


def test_where_no_kernel_runs_the_group_s_own_all_reduce_does(monkeypatch: Any) -> None:
    calls: list[tuple[int, ...]] = []

    def own(x: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return x.clone()

    group = torch.distributed.group.WORLD.group_name  # type: ignore[union-attr]
    dynamic = Dynamic(model, acme(monkeypatch, few(Rows(0, 4))))
    fusion_core.use_all_reduce(group, own)
    try:
        assert [dynamic(rows) for rows in (2, 7)] == [["few"], []]
    finally:
        fusion_core.use_all_reduce(group, None)
    assert calls == [(7, HIDDEN)]
    assert dynamic(9) == []
    assert len(calls) == 1


def test_a_residual_of_any_strides_is_added(monkeypatch: Any) -> None:
    def apart(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return add_then(norm)(x * 1, torch.stack((r, -r), 1)[:, 0], w[torch.arange(HIDDEN)])

    dynamic = Dynamic(apart, acme(monkeypatch, few(Rows(0, 4))))
    assert [dynamic(rows) for rows in (2, 7)] == [["few"], []]
    by_rows = Dynamic(lambda x, r, w: model(x, r.t().contiguous().t(), w), acme(monkeypatch, few(Rows(0, 4))))
    assert [by_rows(rows) for rows in (2, 7, 9)] == [["few"], [], []]


def test_a_sum_alone_takes_part_with_the_rest_of_the_pattern_behind_it(monkeypatch: Any) -> None:
    alone = Strategy("all_reduce", "acme.sum", own_sum, worthwhile=(Rows(8, 64),))
    dynamic = Dynamic(model, acme(monkeypatch, few(Rows(0, 8)), alone))
    assert [dynamic(rows) for rows in (2, 9, 64, 65)] == [["few"], ["sum"], ["sum"], []]
    # by itself it leaves the rest to Inductor, and the operator picks between sums alone
    dynamic = Dynamic(model, acme(monkeypatch, alone))
    assert [dynamic(rows) for rows in (2, 9, 65)] == [[], ["sum"], []]
    assert dynamic.reports[0].sites[0].pattern == "all_reduce"
    assert any("rsqrt" in str(node.target) for node in dynamic.graphs[0].nodes)


def test_measurements_decide_at_run_time_as_at_compile_time(monkeypatch: Any, tmp_path: Path) -> None:
    path = table(
        tmp_path,
        (2, {"unfused": 10.0, "acme.few": 5.0, "acme.many": 9.0}),
        (32, {"unfused": 20.0, "acme.few": 30.0, "acme.many": 10.0}),
        (64, {"unfused": 30.0, "acme.few": 60.0, "acme.many": 40.0}),
    )
    using = acme(monkeypatch, few(Rows(-2, -1)), many(), config=FusionConfig(table=path))
    dynamic = Dynamic(model, using)
    assert [dynamic(rows) for rows in (2, 32, 64)] == [["few"], ["many"], []]
    choices = dynamic.reports[0].sites[0].choices
    for rows in (2, 5, 8, 20, 32, 40, 50, 64):
        fixed = fuse(model, *given(rows), using=using)
        by_count = [choice.strategy for choice in choices if choice.first <= rows][-1]
        assert fixed.site.strategy == by_count, rows
    (choice,) = fuse(model, *given(32), using=using).site.choices
    assert str(choice.timing) == "fused 10.0 us, unfused 20.0 us at 32 tokens"
    refused = fuse(model, *given(64), using=using).site.decisions
    words = {d.strategy: str(d.reasons[0]) for d in refused if d.stage is Stage.WORTHWHILE}
    assert words["acme.many"] == "40.0 us, where the unfused path takes 30.0 us, at 64 tokens, needs less"


def test_of_what_is_as_fast_the_longest_pattern_runs(monkeypatch: Any, tmp_path: Path) -> None:
    alone = Strategy("all_reduce", "acme.sum", own_sum)
    times = {"unfused": 10.0, "acme.few": 5.0}
    points = ((2, {**times, "acme.sum": 4.91}), (8, {**times, "acme.sum": 4.8}))
    using = acme(monkeypatch, few(), alone, config=FusionConfig(table=table(tmp_path, *points)))
    assert fuse(model, *given(2), using=using).site.strategy == "acme.few"
    assert fuse(model, *given(8), using=using).site.strategy == "acme.sum"


def test_what_its_own_backend_s_table_lacks_is_not_known_to_pay(monkeypatch: Any, tmp_path: Path) -> None:
    points = ((2, {"unfused": 10.0, "acme.few": 50.0}), (8, {"unfused": 10.0, "acme.few": 50.0}))
    using = acme(monkeypatch, few(), many(), config=FusionConfig(table=table(tmp_path, *points)))
    fixed = fuse(model, *given(4), using=using)
    assert fixed.site.strategy == f"reference.{ADD}"
    words = {d.strategy: str(d.reasons[0]) for d in fixed.site.decisions if d.stage is Stage.WORTHWHILE}
    lacking = "the table has no figure for it at 4 tokens, needs one; fusion-core tune measures it on this machine"
    assert words["acme.many"] == lacking
    # of a backend that was not there when it was made, a table says nothing
    points = ((2, {"unfused": 10.0, "other.few": 50.0}), (8, {"unfused": 10.0, "other.few": 50.0}))
    using = acme(monkeypatch, few(Rows(-2, -1)), many(), config=FusionConfig(table=table(tmp_path, *points)))
    assert fuse(model, *given(4), using=using).site.strategy == "acme.many"


def test_another_table_is_another_key_of_the_compile_cache(monkeypatch: Any, tmp_path: Path) -> None:
    from fusion_core import FusionPass

    config = FusionConfig(table=table(tmp_path, (2, {"unfused": 10.0, "acme.few": 50.0})))
    first = FusionPass(registry=acme(monkeypatch, few(), config=config)).uuid()
    table(tmp_path, (2, {"unfused": 10.0, "acme.few": 5.0}))
    second, third = (FusionPass(registry=acme(monkeypatch, few(), config=config)).uuid() for _ in range(2))
    assert first != second == third


def test_outside_what_was_measured_the_declaration_decides(monkeypatch: Any, tmp_path: Path) -> None:
    path = table(tmp_path, (2, {"unfused": 10.0, "acme.few": 50.0}), (8, {"unfused": 10.0, "acme.few": 50.0}))
    dynamic = Dynamic(model, acme(monkeypatch, few(Rows(0, 16)), config=FusionConfig(table=path)))
    assert [dynamic(rows) for rows in (2, 8, 9, 16, 17)] == [[], [], ["few"], ["few"], []]


def test_deterministic_numerics_choose_one_for_all_counts(monkeypatch: Any, tmp_path: Path) -> None:
    path = table(tmp_path, (2, {"unfused": 10.0, "acme.few": 50.0}), (8, {"unfused": 10.0, "acme.few": 5.0}))
    config = FusionConfig(numerics="deterministic", table=path)
    dynamic = Dynamic(model, acme(monkeypatch, many(), few(Rows(0, 4), batch_invariant=True), config=config))
    assert [dynamic(rows) for rows in (2, 8, 100)] == [["few"]] * 3
    (site,) = dynamic.reports[0].sites
    reason = next(d.reasons[0] for d in site.decisions if d.strategy == "acme.many")
    assert (reason.code, "other bits in another batch" in str(reason)) == ("numerics", True)
    fixed = fuse(model, *given(2), using=acme(monkeypatch, few(Rows(-2, -1), batch_invariant=True), config=config))
    assert fixed.site.strategy == "acme.few"


def test_more_rows_than_a_workspace_is_to_hold_run_unfused(monkeypatch: Any) -> None:
    def impl(x: Tensor, residual: Tensor, weight: Any, eps: float, *, group: str, max_tokens: int | None = None) -> Any:
        return FEW(x, residual, weight, eps, group)

    holding = Strategy(ADD, "acme.few", impl, outputs=OUTPUTS)
    dynamic = Dynamic(model, acme(monkeypatch, holding, config=FusionConfig(max_tokens=8)))
    assert [dynamic(rows) for rows in (8, 9)] == [["few"], []]
    fixed = fuse(model, *given(9), using=acme(monkeypatch, holding, config=FusionConfig(max_tokens=8)))
    refused = next(d for d in fixed.site.decisions if d.strategy == "acme.few")
    assert str(refused.reasons[0]) == "9 tokens are more than max_tokens, needs at most 8"


def test_a_place_without_rows_sends_nothing(monkeypatch: Any) -> None:
    dynamic = Dynamic(model, acme(monkeypatch, few(Rows(0, 8))))
    assert dynamic(3) == ["few"]
    assert dynamic(0) == []


def test_a_plan_comes_back_from_its_text_in_another_process(monkeypatch: Any) -> None:
    constants = {"eps": 1e-5, "weight_bias": 1.0, "norm_dtype": torch.float32, "scale_layout": "linear", "group": "0"}
    plan = Plan(ADD, OUTPUTS, ("residual", "weight"), constants, ((1, "acme.few"), (9, None)), {"acme.few": {"a": 1}})
    assert Plan.of(plan.text()) == plan
    monkeypatch.setattr(named, "_strategies", {})
    assert named.strategy_of(f"reference.{ADD}").name == f"reference.{ADD}"  # by its entry point
    with pytest.raises(Exception, match=r"runs acme\.gone, which no installed backend has"):
        named.strategy_of("acme.gone")


def test_inductor_compiles_it_with_everything_around(monkeypatch: Any) -> None:
    from fusion_core import FusionPass
    from fusion_core._torch import inductor

    using = acme(monkeypatch, few(Rows(0, 8)))
    torch._dynamo.reset()
    options = inductor.with_pass(FusionPass(registry=using), {"fx_graph_cache": False})
    compiled = torch.compile(model, fullgraph=True, options=options)
    for rows in (3, 20, 8, 9):
        x, r, w = given(rows, torch.bfloat16)
        kept = x.clone()
        for tensor in (x, r):
            torch._dynamo.mark_dynamic(tensor, 0)
        ran.clear()
        with torch.no_grad():
            found = compiled(x, r, w)
            assert ran == (["few"] if rows <= 8 else [])
            torch.testing.assert_close(found, model(x, r, w), atol=0.05, rtol=0.02)
        assert torch.equal(x, kept)
