"""How the facts of ranks compare: what decides over a whole group, over one backend, or over nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fusion_core.agree.facts import RankDifferences, compare

BACKEND = {
    "is": "acme 1",
    "with": {"libacme": "1"},
    "strategies": {"acme.add": "a"},
    "sources": "s",
    "reads": False,
    "unavailable": {"cuda (sm_90)": [], "cpu": ["no"]},
}
FACTS: dict[str, Any] = {
    "fusion_core": "1 (abc)",
    "torch": "2.13",
    "device": "cuda (sm_90)",
    "config": {"order": None, "limit": None},
    "backends": {"acme": BACKEND},
    "table": [None, ""],
}


def differing(**changed: Any) -> list[str]:
    """Why ranks 0, 1 and 2 differ where the last one has something else."""
    ground = compare([FACTS, FACTS, {**FACTS, **changed}], (0, 1, 2))
    return [f"{'whole: ' if reason in ground.whole else ''}{reason.found}" for reason in ground.reasons]


def acme(**changed: Any) -> list[str]:
    return differing(backends={"acme": {**BACKEND, **changed}})


def test_equal_facts_are_common_ground() -> None:
    assert compare([FACTS, FACTS], (0, 1)) == RankDifferences()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"fusion_core": "2 (abc)", "config": {}}, "rank 2 has fusion_core 2 (abc), rank 0 has fusion_core 1 (abc)"),
        ({"torch": "2.14"}, "rank 2 has torch 2.14, rank 0 has torch 2.13"),
        ({"device": "cuda (sm_100)"}, "rank 2 runs on cuda (sm_100), rank 0 runs on cuda (sm_90)"),
        ({"config": {"order": ["acme"], "limit": None}}, "rank 2 has order=('acme'), rank 0 has order=None"),
    ],
)
def test_some_facts_decide_over_the_whole_group(changed: Any, why: str) -> None:
    assert differing(**changed) == [f"whole: nothing is fused: {why}"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"is": "acme 2"}, "rank 2 has acme 2, rank 0 has acme 1"),
        ({"with": {"libacme": None}}, "rank 2 has libacme none, rank 0 has libacme 1"),
        ({"strategies": {}}, "rank 2 declares acme.add as no strategy, rank 0 declares acme.add as a"),
        ({"sources": "t"}, "rank 2 has the sources t, rank 0 has the sources s"),
        (
            {"unavailable": {"cuda (sm_90)": ["no GPU memory"], "cpu": ["no"]}},
            "rank 2 cannot use it on cuda (sm_90) (no GPU memory), on cpu (no), rank 0 cannot use it on cpu (no)",
        ),
    ],
)
def test_others_decide_over_one_backend(changed: Any, why: str) -> None:
    assert acme(**changed) == [f"acme is not used: {why}"]


def test_a_backend_that_no_rank_can_use_needs_no_agreement() -> None:
    broken = {"acme": {"failure": "broken"}}
    assert compare([{**FACTS, "backends": broken}, {**FACTS, "backends": {}}], (0, 1)).backends == {}
    other = {"acme": {**BACKEND, "is": "acme 2", "unavailable": {"cpu": ["another reason"]}}}
    both = [{**FACTS, "backends": {"acme": {**BACKEND, "unavailable": {"cpu": ["no"]}}}}, {**FACTS, "backends": other}]
    assert compare(both, (0, 1)) == RankDifferences()


def test_reasons_of_unavailability_may_differ() -> None:
    assert acme(unavailable={"cuda (sm_90)": [], "cpu": ["in other words"]}) == []


def test_how_graphs_are_read_is_common_ground_even_where_a_backend_cannot_be_used() -> None:
    unusable = {**BACKEND, "reads": True, "unavailable": {"cpu": ["no"]}}
    ground = compare([{**FACTS, "backends": {"acme": unusable}}, {**FACTS, "backends": {}}], (0, 1))
    assert [reason.found for reason in ground.whole] == [
        "nothing is fused, as acme reads graphs: rank 1 does not have it, rank 0 has acme 1"
    ]


def test_tables_are_compared_by_content() -> None:
    one = {**FACTS, "table": ["f" * 64, "/one.json"]}
    assert compare([one, {**FACTS, "table": ["f" * 64, "/two.json"]}], (0, 1)) == RankDifferences()
    table = compare([FACTS, one], (0, 1)).table
    assert table is not None
    assert table.found == "no tuning table is used: rank 1 has /one.json (ffffffffffff), rank 0 has none"
