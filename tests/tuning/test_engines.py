"""Base lines of serving engines: their own all_reduces beside torch's, in `tune`, in tables, and where tables decide."""

from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_core import ConfigError
from fusion_core.decide.measured import timing
from fusion_core.samples.sites import example_site, resized
from fusion_core.tables import Machine, Row, Table
from fusion_core.tables.store import to_json
from fusion_core.tune import engines
from fusion_core.tune.crossovers import base_lines, crossovers
from fusion_core.workers import WorkerPool
from tests.tuning import jobs

OWN = "acme::all_reduce"
COLUMN = f"unfused {OWN}"


def table(*points: dict[str, float]) -> Table:
    rows = tuple(Row("all_reduce", "bfloat16", 4096, 2**n, us) for n, us in enumerate(points))
    return Table(Machine.here(2), rows, "2026-11-22T10:00:00+00:00", "a test")


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(n, f"tests.tuning.jobs:{n}_engine", engines.GROUP) for n in ("acme", "broken", "odd")]
    monkeypatch.setattr(engines, "entry_points", lambda group: points)


class Alone:
    def gather(self, value: object) -> list[object]:
        return [value]


ALONE: Any = Alone()


def test_an_engine_s_all_reduce_is_set_up_for_the_block(offer: None) -> None:
    jobs.engine_log.clear()
    with engines.all_reduce_of("acme", ALONE) as found:
        assert list(found) == [OWN]
        assert jobs.engine_log == ["set up"]
    assert jobs.engine_log == ["set up", "gone"]
    with engines.all_reduce_of(None, ALONE) as found:
        assert found == {}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "--collective broken cannot be set up: rank 0: RuntimeError: no driver"),
        ("odd", "--collective odd cannot be set up: rank 0: TypeError: it gives 5, needs a fusion_core.AllReduce"),
    ],
)
def test_what_cannot_be_measured_is_said_with_its_name(offer: None, name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why), engines.all_reduce_of(name, ALONE):
        pass


def test_a_name_that_nobody_offers_is_said_with_those_that_are(offer: None) -> None:
    engines.check("acme")
    with pytest.raises(ConfigError, match="--collective is 'vlm', needs one of an engine: acme, broken, odd"):
        engines.check("vlm")


def test_where_one_rank_lacks_an_engine_all_say_so_and_none_waits_for_it() -> None:
    with WorkerPool(2, timeout=60) as pool:
        assert (
            pool.run(jobs.engine_of_rank_0)
            == ["--collective acme cannot be set up: rank 1: ModuleNotFoundError: No module named 'engine'"] * 2
        )


def test_vllm_s_is_offered() -> None:
    assert engines.offered()["vllm"].value == "fusion_vllm.tuning:all_reduce"


def test_it_is_measured_beside_torch_s_and_a_wrong_one_has_no_times() -> None:
    with WorkerPool(2) as pool:
        (us, notes, captures), other = pool.run(jobs.measured_with_engines)
    assert (us, notes) == other[:2]
    assert {"unfused", COLUMN, "acme.right"} == us.keys()
    assert notes["unfused wrong::all_reduce"].startswith("its results differ from the unfused path's by ")
    assert captures == 1


def test_a_base_line_is_the_fastest_path_of_its_own_comparison_alone() -> None:
    measured = table({"unfused": 16.0, COLUMN: 3.0, "acme.sum": 4.0}, {"unfused": 20.0, COLUMN: 9.0, "acme.sum": 5.0})
    assert base_lines(measured) == ("unfused", COLUMN)
    assert [(each.first, each.path, each.gains) for each in crossovers(measured)] == [(1, "acme.sum", (4.0, 4.0))]
    assert [(each.first, each.path, each.gains) for each in crossovers(measured, COLUMN)] == [
        (1, COLUMN, (1.0, 1.0)),
        (2, "acme.sum", (1.8, 1.8)),
    ]
    assert measured.backends == {"acme"}
    some = table({"unfused": 16.0, COLUMN: 3.0}, {"unfused": 16.0})
    assert base_lines(some) == ("unfused",)


@pytest.mark.parametrize(
    ("collective", "words"),
    [
        (None, "fused 4.0 us, unfused 16.0 us at 1 token"),
        ("_c10d_functional::all_reduce_coalesced", "fused 4.0 us, unfused 16.0 us at 1 token"),
        (OWN, f"fused 4.0 us, unfused by {OWN} 3.0 us at 1 token"),
        ("vllm::all_reduce", "fused 4.0 us, unfused by torch's all_reduce 16.0 us at 1 token"),
    ],
)
def test_a_site_is_compared_with_the_all_reduce_that_it_calls(
    tmp_path: Path, collective: str | None, words: str
) -> None:
    path = tmp_path / "table.json"
    path.write_text(to_json(table({"unfused": 16.0, COLUMN: 3.0, "acme.right": 4.0})), encoding="utf-8")
    registry = jobs.registry(table=str(path))
    pattern = registry.patterns["all_reduce"]
    site = resized(pattern, example_site(pattern, world_size=2), (1, 4096))
    x = replace(site.inputs["x"], dtype=torch.bfloat16)
    notes = {} if collective is None else {"collective": collective}
    site = replace(site, inputs={"x": x}, attributes={**site.attributes, **notes})
    strategy = next(each for each in registry.strategies("all_reduce") if each.name == "acme.right")
    found = timing(registry, strategy, pattern, site, 1)
    assert str(found) == words
    slower = found.slower() if found is not None else None
    assert (slower is not None) == (collective == OWN)
    if slower is not None:
        assert str(slower) == f"4.0 us, where the unfused path by {OWN} takes 3.0 us, at 1 token, needs less"
