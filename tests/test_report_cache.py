"""The report of a graph that comes from Inductor's cache is that of the compilation which the graph comes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import fusion_core
from fusion_core import FusionConfig
from fusion_core._torch import inductor
from fusion_core.report import history
from tests.test_matching import norm, reduce, tensors

pytestmark = pytest.mark.usefixtures("one_rank")
c10d = torch.ops._c10d_functional


class Drop(CustomGraphPass):
    """Takes every all_reduce away, as a pass that moves them elsewhere would."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target in (c10d.all_reduce.default, c10d.wait_tensor.default):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)

    def uuid(self) -> str:
        return "drop"


def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return norm(total, w), total


def same_model(hidden: torch.Tensor, before: torch.Tensor, gamma: torch.Tensor) -> Any:
    summed = before + reduce(hidden)
    return norm(summed, gamma), summed


def went(function: Callable[..., Any] = model, **given: Any) -> tuple[str, int]:
    """Where the graph comes from by its report, and how many all_reduces the report has."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        torch.compile(function, backend="fusion_core", **given)(*tensors())
    hits = counters["inductor"]["fxgraph_cache_hit"]
    report = fusion_core.last_report()
    assert (report.origin == "cache") == bool(hits)
    return report.origin, len(report.sites)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where reports are kept; that of `model` is."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert went() == ("compiled", 1)
    return tmp_path / "fusion_core"


def test_compilations_that_differ_by_a_pass_or_an_option_have_reports_of_their_own(cached: Path) -> None:
    for name in ("post_grad_custom_pre_pass", "post_grad_custom_post_pass"):
        assert went(options={name: Drop()}) == ("compiled", 0)
        assert went() == ("cache", 1)
        assert went(options={name: Drop()}) == ("cache", 0)
    assert went(options={"epilogue_fusion": False}) == ("compiled", 1)


def test_a_graph_has_its_report_under_other_names_of_arguments(cached: Path) -> None:
    assert went(same_model) == ("cache", 1)
    assert "was not kept" not in str(fusion_core.last_report())


def test_a_file_of_another_content_is_no_report_even_where_it_is_one(cached: Path) -> None:
    (file,) = cached.iterdir()
    file.write_text(file.read_text().replace("all_reduce_add_rms_norm", "all_reduce_rms_norm"))
    assert went() == ("cache", 0)
    assert "its report was not kept" in str(fusion_core.last_report())


def test_nothing_is_kept_where_the_users_options_turn_the_cache_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert went(options={"fx_graph_cache": False}) == ("compiled", 1)
    assert not (tmp_path / "fusion_core").exists()


def test_names_that_graphs_are_given_do_not_stay_among_inductors_counters(cached: Path) -> None:
    assert went() == ("cache", 1)
    assert not [name for name in counters["inductor"] if name.startswith(inductor.LABEL)]


def test_a_compilation_that_is_taken_from_the_cache_in_part_has_both_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, r, w = tensors()

    def origins() -> list[tuple[str, int]]:
        torch._dynamo.reset()
        with history.collecting() as heard:
            torch.compile(model, backend="fusion_core")(x, r, w.requires_grad_())
        return [(report.origin, len(report.sites)) for report in heard]

    with torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        assert origins() == [("compiled", 1), ("compiled", 0)]
        graphs = sorted((tmp_path / "fxgraph").glob("*/*"), key=lambda graph: graph.stat().st_mtime)
        assert len(graphs) == 2
        shutil.rmtree(graphs[1])  # the backward pass
        assert origins() == [("compiled", 0), ("cache", 1)]


def test_a_configuration_has_a_report_of_its_own(cached: Path) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        fusion_core.compile(model, FusionConfig(limit=0))(*tensors())
    assert [site.strategy for site in fusion_core.last_report().sites] == [None]
    assert went() == ("cache", 1)
    assert fusion_core.last_report().sites[0].strategy is not None
