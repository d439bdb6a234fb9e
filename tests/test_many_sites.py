"""Reports of large models: bounded in memory and as JSON, and made in a time that grows with the sites alone."""

from __future__ import annotations

import cProfile
import json
from typing import Any

import pytest
from torch import Tensor

import fusion_core
from fusion_core import ConfigError, FusionConfig, FusionPass, Report, fallback, fell_back
from fusion_core.decision import Choice
from fusion_core.plugins.fingerprint import fingerprint
from fusion_core.reason import Reason
from fusion_core.report import history
from fusion_core.report.report import Outcome, SiteReport
from tests.corpus.case import norm, reduce
from tests.support.graphs import REFERENCE, registry
from tests.support.layers import stacked
from tests.test_matching import tensors

pytestmark = pytest.mark.usefixtures("one_rank")


def layer(h: Tensor, r: Tensor, w: Tensor) -> Any:
    """The weight is one tensor for all layers: what looks through its users at each site looks at all sites."""
    total = r + reduce(h)
    return norm(total, w), total


def reported(layers: int) -> tuple[Report, int]:
    """The report of a model of equal layers, and how many calls the pass took for it."""
    graph = stacked(layer, tensors(), layers)
    own, profile = FusionPass(registry=registry(REFERENCE)), cProfile.Profile()
    report = profile.runcall(own.run, graph)
    return report, sum(entry.callcount for entry in profile.getstats())


def test_the_work_for_a_site_does_not_grow_with_their_number() -> None:
    few, some, many = (reported(layers)[1] for layers in (20, 120, 240))
    assert (many - some) / 120 <= 1.02 * (some - few) / 100, "of what is done once, nothing counts"


def test_a_report_of_two_thousand_sites_is_small_and_as_quick_to_make_for_each_site() -> None:
    _, few = reported(200)
    report, many = reported(2000)
    assert len(report.sites) == 2000
    assert many / 2000 <= 1.5 * few / 200
    assert len(json.dumps(report.to_dict())) < 2e6


def test_equal_sites_share_their_decisions_in_memory_and_as_json() -> None:
    report, _ = reported(20)
    assert len({id(site.decisions) for site in report.sites}) < 4  # the ends of a model differ from its middle
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["decisions"]) < 4
    again = Report.from_dict(data)
    assert [site.decisions for site in again.sites] == [site.decisions for site in report.sites]
    assert len({id(site.decisions) for site in again.sites}) < 4


def test_the_newest_reports_are_kept_and_no_more(monkeypatch: Any) -> None:
    monkeypatch.setattr(history, "_reports", [])
    for number in range(5):
        history.record(Report(sites=(), device=str(number)), 3)
    assert [report.device for report in fusion_core.reports()] == ["2", "3", "4"]
    graph = stacked(layer, tensors(), 1)
    FusionPass(registry=registry(REFERENCE, config=FusionConfig(reports=2)))(graph)
    assert [len(report.sites) for report in fusion_core.reports()] == [0, 1]
    assert fusion_core.last_report() is fusion_core.reports()[-1]


@pytest.mark.parametrize("given", [0, -1, True, 1.5, None])
def test_how_many_are_kept_is_a_whole_number(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"reports is .*, needs a whole number of at least 1"):
        FusionConfig(reports=given)


def test_the_environment_says_how_many_and_no_cached_graph_depends_on_it(monkeypatch: Any) -> None:
    keys = {fingerprint(registry(REFERENCE))}
    monkeypatch.setenv("FUSION_CORE_REPORTS", "7")
    assert FusionConfig().reports == 7
    keys.add(fingerprint(registry(REFERENCE)))
    assert len(keys) == 1
    monkeypatch.setenv("FUSION_CORE_REPORTS", "0")
    with pytest.raises(ConfigError, match="FUSION_CORE_REPORTS is '0', needs a whole number, 1 or more"):
        FusionConfig()


def test_a_site_that_picks_by_size_says_which_of_its_strategies_runs_unfused(monkeypatch: Any) -> None:
    monkeypatch.setattr(fallback, "_fallen_back", {})
    choices = (Choice(1, "acme.few"), Choice(100, "acme.many"), Choice(1000, None))
    attributes = {"inputs": {"x": "bfloat16[s0, 64]"}, "live": {}, "group": "0", "world_size": 2}
    report = Report(sites=(SiteReport("all_reduce", "acme.few", "all_reduce", attributes, (), choices),), device="cpu")
    assert report.outcomes == (Outcome.KERNEL,)
    fell_back("acme.many", "0", Reason("ranks", "rank 1 runs another graph"))
    assert report.outcomes == (Outcome.RAN_UNFUSED,)
    assert str(report).startswith("fusion_core: 0 of 1 all_reduces on a kernel, 1 unfused at run time, on 2 x cpu")
    assert "  acme.many runs unfused: rank 1 runs another graph (at all_reduce)" in str(report).splitlines()
