"""Every row of the corpus, compiled for real: what models write is found, and nothing else."""

from typing import Any

import pytest
import torch

from tests.corpus import all_reduces
from tests.corpus.batches import ByRow, Outcome, Row, batches, compiled, explained
from tests.corpus.case import Case, NearMiss
from tests.corpus.judging import judge, judge_near_miss
from tests.corpus.placing import Placed
from tests.corpus.rows import CASES, NEAR_MISSES, ROWS
from tests.support import casts, profiles

pytestmark = pytest.mark.usefixtures("groups")
SOON = {row.name for batch in batches(ROWS)[::5] for row in batch}
"""Rows that `make test` has explained as well; each explanation of a batch is another compilation, and
`test_explained_is_placed.py` has those of every pattern."""


@pytest.fixture(scope="module")
def outcomes(groups: str) -> ByRow[Outcome]:
    return ByRow(ROWS, compiled)


@pytest.fixture(scope="module")
def dry(groups: str) -> ByRow[Placed]:
    return ByRow(ROWS, explained)


@pytest.mark.parametrize("case", CASES)
def test_a_chain_is_found_whatever_its_spelling(case: Case, outcomes: ByRow[Outcome]) -> None:
    judge(case, outcomes[case])


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_what_only_looks_like_the_chain_is_left_alone_with_a_reason(miss: NearMiss, outcomes: ByRow[Outcome]) -> None:
    if miss.by_casts and not casts.KEPT:
        pytest.skip(f"torch {torch.__version__} removes the rounding, which leaves the chain")
    judge_near_miss(miss, outcomes[miss])


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(*each.values, id=each.id, marks=[] if each.values[0].name in SOON else [pytest.mark.nightly])
        for each in (*CASES, *NEAR_MISSES)
    ],
)
def test_what_explain_names_is_placed(row: Row, dry: ByRow[Placed], outcomes: ByRow[Outcome]) -> None:
    assert dry[row]
    assert dry[row] == outcomes[row].placed


def test_each_site_knows_its_own_group(outcomes: ByRow[Outcome]) -> None:
    row = next(case for case in all_reduces.CASES if case.name == "two groups, the second")
    default, second = outcomes[row].sites
    assert second.attributes["group"] == all_reduces.SECOND["name"] != default.attributes["group"]


def test_the_rows_of_each_graph_are_judged_in_it(outcomes: ByRow[Outcome], dry: ByRow[Placed]) -> None:
    """Otherwise each of them is compiled alone, which nothing else would show."""
    for row in ROWS:
        assert outcomes[row].sites
    for row in ROWS if profiles.current() == "nightly" else (row for row in ROWS if row.name in SOON):
        assert len(outcomes[row].placed) == len(dry[row])
    assert outcomes.given_up == dry.given_up == {}
    assert len(outcomes.batches) < len(ROWS) / 8


@pytest.mark.parametrize("params", [CASES, NEAR_MISSES], ids=["cases", "near misses"])
def test_every_row_has_a_name_of_its_own(params: list[Any]) -> None:
    names = [param.id for param in params]
    assert len(names) == len(set(names))
    assert torch.get_default_dtype() is torch.float32  # the float64 runs leave nothing behind
