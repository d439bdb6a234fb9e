import json
import math

import pytest

from fusion_core import fell_back
from fusion_core.bench.result import Fusion, Outcome
from fusion_core.reason import Reason
from fusion_core.report.report import Report, SiteReport
from tests.benching.rows import row


def test_gain_is_of_the_medians_and_its_range_of_single_rounds():
    made = row(plain_us=(120.0, 110.0, 130.0), fused_us=(100.0, 110.0, 104.0))
    assert made.gain == 120.0 / 104.0
    assert made.gains == (1.2, 1.0, 1.25)


@pytest.mark.parametrize(
    ("changes", "fail_below", "says"),
    [
        ({}, None, ""),
        ({}, 1.15, ""),
        ({}, 1.16, "batch 8: gain is 1.150, needs at least 1.16"),
        ({"batch": None}, 1.16, "gain is 1.150"),
        ({"difference": 0.1}, None, ""),
        (
            {"difference": 0.11},
            None,
            "with and without fusion_core differ by 0.11 of the largest magnitude, needs at most 0.1",
        ),
        ({"difference": math.inf}, None, "differ in shape or in where they are finite"),
        ({"difference": None, "repeated": None}, None, ""),
        ({"difference": 0.5, "repeated": 0.5}, None, "two calls without fusion_core differ by 0.5"),
        ({"repeated": 0.5}, None, "has to rewind it"),
    ],
)
def test_problems(changes, fail_below, says):
    found = row(**changes).problem(fail_below)
    assert says in found
    assert bool(found) == bool(says)
    assert Outcome((row(**changes),), (), "default", "cpu").problems(fail_below) == ((found,) if found else ())


def test_json_has_no_infinities():
    made = Outcome((row(difference=math.inf, batch=None),), (32,), "default", "cpu").to_dict()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["left_out"] == [32]
    assert made["rows"][0]["difference"] is None
    assert made["rows"][0]["gain_by_round"] == [1.2, 1.1, 1.15]


def site(strategy, group="0"):
    return SiteReport("all_reduce", strategy, "all_reduce_1", {"group": group, "world_size": 2}, ())


def test_sites_of_all_graphs_count_and_one_that_fell_back_is_not_fused():
    fell_back("acme.late", "benched", Reason("memory", "no memory is left", "more"))
    reports = (
        Report(sites=(site("acme.one_shot"), site(None))),
        Report(sites=(site("acme.one_shot"), site("acme.late", "benched"))),
    )
    found = Fusion.of(reports)
    assert (found.sites, found.fused) == (4, 2)
    assert found.strategies == {"acme.one_shot": 2}
    assert found.fell_back == ("acme.late: no memory is left, needs more",)
