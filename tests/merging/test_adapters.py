"""A LoRA adapter on a row-parallel layer: its all_reduce has to run before that of the layer."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

import pytest

from fusion_core.workers import WorkerPool
from tests.merging import adapters
from tests.test_matching import ADD


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, timeout=300.0) as pool:
        yield pool


def test_it_is_fused_where_all_ranks_run_the_same_graphs(pool: WorkerPool) -> None:
    for report, calls, found, written in pool.run(adapters.run, True):
        assert [site.pattern for site in report.sites] == [ADD, "all_reduce"]
        assert report.sites[0].attributes["reassociated"]
        assert calls == 2
        assert mean(e.squared for e in found) <= 1.1 * mean(e.squared for e in written)
        assert mean(e.largest for e in found) <= 1.1 * mean(e.largest for e in written)


def test_by_default_it_is_left_and_the_reason_is_the_order(pool: WorkerPool) -> None:
    for report, calls, found, written in pool.run(adapters.run, False):
        assert [site.pattern for site in report.sites] == ["all_reduce"] * 2
        reasons = [str(reason) for decision in report.sites[0].decisions for reason in decision.reasons]
        wanted = "which the model calls later, needs all inputs before the next collective; FusionConfig(merge=True)"
        assert any(wanted in reason for reason in reasons), reasons
        assert calls == 2
        assert found == written
