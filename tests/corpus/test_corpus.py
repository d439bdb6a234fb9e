"""Every row of the corpus, compiled for real: what models write is found, and nothing else."""

from typing import Any

import pytest
import torch

from tests.corpus import all_reduces, near_misses, norms, quantisation, residuals, shapes
from tests.corpus.case import Case, NearMiss
from tests.corpus.judging import compiled, judge, judge_near_miss

pytestmark = pytest.mark.usefixtures("groups")

TOPICS = (norms, residuals, all_reduces, quantisation, shapes, near_misses)
CASES = [
    pytest.param(case, id=f"{topic.__name__.rpartition('.')[2]}: {case.name}")
    for topic in TOPICS
    for case in topic.CASES
]
NEAR_MISSES = [pytest.param(miss, id=miss.name) for miss in near_misses.NEAR_MISSES]


@pytest.mark.parametrize("case", CASES)
def test_a_chain_is_found_whatever_its_spelling(case: Case) -> None:
    judge(case)


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_what_only_looks_like_the_chain_is_left_alone_with_a_reason(miss: NearMiss) -> None:
    judge_near_miss(miss)


def test_each_site_knows_its_own_group() -> None:
    row = next(case for case in all_reduces.CASES if case.name == "two groups, the second")
    fused, _ = compiled(row.function, row.given)
    default, second = fused.sites
    assert second.attributes["group"] == all_reduces.SECOND["name"] != default.attributes["group"]


@pytest.mark.parametrize("params", [CASES, NEAR_MISSES], ids=["cases", "near misses"])
def test_every_row_has_a_name_of_its_own(params: list[Any]) -> None:
    names = [param.id for param in params]
    assert len(names) == len(set(names))
    assert torch.get_default_dtype() is torch.float32  # the float64 runs leave nothing behind
