"""A report says which tuning table decided, and on a GPU that none did and how to make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol

import fusion_core
from fusion_core import Device, FusionConfig, Report, fusion_pass
from tests.support.graphs import fuse
from tests.token_counts import acme, few, given, model, table

pytestmark = pytest.mark.usefixtures("one_rank")

POINT = (2, {"unfused": 10.0, "acme.few": 5.0})
NONE = "none for 4 ranks on cuda (sm_90), needs one; fusion-core tune measures it on this machine"


@pytest.fixture
def on_four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_pass, "_device", lambda graph: Device("cuda", "sm_90"))
    monkeypatch.setattr(fusion_pass, "world_size", lambda group: 4)


def reported(monkeypatch: Any, config: FusionConfig) -> Report:
    return fuse(model, *given(2), using=acme(monkeypatch, few(), config=config)).reports[0]


def test_the_table_that_decides_is_named(monkeypatch: Any, tmp_path: Path) -> None:
    path = table(tmp_path, POINT)
    report = reported(monkeypatch, FusionConfig(table=path))
    assert list(report.tables.values()) == [path]
    assert f"\ntuning table:\n  {path}\n" in f"{report}\n"
    report.to_html(tmp_path / "report.html")
    assert path in (tmp_path / "report.html").read_text()
    again = Report.from_dict(report.to_dict())
    assert (again.tables, again.untuned) == (report.tables, {})


def test_where_no_table_decides_none_is_named(monkeypatch: Any, tmp_path: Path) -> None:
    config = FusionConfig(numerics="deterministic", table=table(tmp_path, POINT))
    assert "tuning table" not in str(reported(monkeypatch, config))


def test_a_dry_run_names_it_too(tmp_path: Path) -> None:
    path = table(tmp_path, POINT)
    report = fusion_core.explain(model, *given(2), config=FusionConfig(table=path))
    assert list(report.tables.values()) == [path]


def test_a_dry_run_of_several_graphs_names_those_of_all_their_groups(tmp_path: Path) -> None:
    other = dist.new_group([0], backend="gloo").group_name

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = funcol.all_reduce(x, "sum", dist.group.WORLD)
        torch._dynamo.graph_break()
        return funcol.all_reduce(x, "sum", other)

    report = fusion_core.explain(broken, torch.ones(2, 16), config=FusionConfig(table=table(tmp_path, POINT)))
    assert len(report.sites) == len(report.tables) == 2


@pytest.mark.usefixtures("on_four_gpus")
def test_on_gpus_without_one_the_command_is_named(monkeypatch: Any) -> None:
    report = reported(monkeypatch, FusionConfig())
    assert report.tables == {}
    assert f"\ntuning table:\n  {NONE}\n" in f"{report}\n"
    again = Report.from_dict(report.to_dict())
    assert again.untuned == report.untuned
    assert str(again) == str(report)


@pytest.mark.usefixtures("on_four_gpus")
def test_on_gpus_a_table_that_does_not_hold_says_why(monkeypatch: Any, tmp_path: Path) -> None:
    path = table(tmp_path, POINT)  # of one rank on a CPU
    with pytest.warns(RuntimeWarning, match="table.json"):
        report = reported(monkeypatch, FusionConfig(table=path))
    (line,) = str(report).partition("tuning table:\n")[2].splitlines()[:1]
    assert line.startswith(f"  {path}: ")


@pytest.mark.usefixtures("on_four_gpus")
def test_who_wants_none_hears_nothing_of_it(monkeypatch: Any) -> None:
    assert "tuning table" not in str(reported(monkeypatch, FusionConfig(table="none")))


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch: Any) -> None:
    monkeypatch.setattr(fusion_pass, "world_size", lambda group: 4)
    report = reported(monkeypatch, FusionConfig())
    assert (report.tables, report.untuned) == ({}, {})
    assert "tuning table" not in str(report)
