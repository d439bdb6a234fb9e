"""The switch for merging, and what reports say of merges."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusion_core import FusionConfig, FusionPass, Report, explain
from fusion_core._torch.inductor import post_grad_only
from fusion_core.report.report import Merge
from tests.corpus.case import ADD
from tests.merging.forms import assert_unmerged, given, residual_first, residual_last, said, used_beside
from tests.support.graphs import REFERENCE, describe, fuse, registry

pytestmark = pytest.mark.usefixtures("one_rank")


def test_the_switch(monkeypatch: Any) -> None:
    monkeypatch.delenv("FUSION_CORE_MERGE")
    off = fuse(residual_last, *given())
    words = "they could be merged, but merging is off, needs the same graphs on all ranks; FusionConfig(merge=True) or "
    assert said(off) == [f"{words}FUSION_CORE_MERGE=1 merges them"]
    assert (off.collectives(off.after[0]), len(off.sites)) == (2, 2)
    monkeypatch.setenv("FUSION_CORE_MERGE", "1")
    assert [merge.reasons for merge in fuse(residual_last, *given()).reports[0].merges] == [()]
    monkeypatch.setenv("FUSION_CORE_MERGE", "0")
    assert said(fuse(residual_last, *given())) == said(off)
    assert said(fuse(used_beside, *given())) == []  # what could not be merged either way is not worth a word


def test_without_a_backend_nothing_is_merged() -> None:
    fused = fuse(residual_last, *given(), config=FusionConfig(order=()))
    assert_unmerged(fused)
    assert (fused.reports[0].merges, len(fused.sites)) == ((), 2)


def test_a_merge_counts_as_a_rewrite() -> None:
    none, one, two = (
        fuse(residual_last, *given(), config=FusionConfig(order=("reference",), limit=limit)) for limit in (0, 1, 2)
    )
    assert_unmerged(none)
    assert said(none) == ["limit is 0 rewrites, needs a higher limit"]
    assert one.collectives(one.after[0]) == 1
    assert [site.strategy for site in one.sites] == [None]
    assert "limit is 1 rewrites" in str(one.reports[0])
    assert [site.strategy for site in two.sites] == [f"reference.{ADD}"]


def test_a_dry_run_says_the_same_and_changes_nothing() -> None:
    found: list[tuple[Report, Report, bool]] = []

    def looked(graph: fx.Graph) -> None:
        before = describe(graph)
        dry = FusionPass(dry_run=True).run(graph)
        assert describe(graph) == before
        found.append((dry, FusionPass().run(graph), describe(graph) != before))

    torch._dynamo.reset()
    torch.compile(residual_last, backend=post_grad_only(looked))(*given())
    ((dry, real, changed),) = found
    assert changed
    assert dry.origin == "explained"
    assert dry.merges == real.merges != ()
    assert [(site.node, site.strategy, site.attributes, site.decisions) for site in dry.sites] == [
        (site.node, site.strategy, site.attributes, site.decisions) for site in real.sites
    ]


def test_explain_has_the_merges_of_every_graph() -> None:
    def model(a: Tensor, b: Tensor, c: Tensor, r: Tensor, w: Tensor) -> Any:
        first, _ = residual_last(a, b, c, r, w)
        torch._dynamo.graph_break()
        return residual_first(first, b, c, r, w)

    with torch.no_grad():
        report = explain(model, *given())
    assert [len(merge.nodes) for merge in report.merges] == [2, 2]
    assert [site.pattern for site in report.sites] == [ADD, ADD]


def test_the_report_shows_merges_and_goes_to_json_and_back(tmp_path: Any) -> None:
    (merged,) = fuse(residual_last, *given(), using=registry(REFERENCE)).reports
    (refused,) = fuse(used_beside, *given(), using=registry(REFERENCE)).reports
    assert "merged:\n  all_reduce into all_reduce_1: one all_reduce of the sum" in str(merged)
    line = (
        "all_reduce + all_reduce_1 [stay 2]: the result of all_reduce is also used outside the sum, needs no other use"
    )
    assert f"  {line}\n" in str(refused)
    for report in (merged, refused):
        data = json.loads(json.dumps(report.to_dict()))
        assert Report.from_dict(data).merges == report.merges
        assert str(Report.from_dict(data)) == str(report)
    refused.to_html(tmp_path / "report.html")
    assert f"<h2>Merged</h2><ul><li>{line}</li></ul>" in (tmp_path / "report.html").read_text()
    assert "merged:" not in str(replace(merged, merges=()))
    assert Merge(("a", "b")).reasons == ()


def test_the_switch_changes_the_cache_key() -> None:
    keys = {
        FusionPass(registry=registry(REFERENCE, config=FusionConfig(merge=merge))).uuid() for merge in (True, False)
    }
    assert len(keys) == 2
