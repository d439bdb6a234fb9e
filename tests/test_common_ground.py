"""Ranks that differ, come late or not at all choose alike, and say why."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fusion_core.agree import agreement, group_store
from fusion_core.agree import ranks as common_ground
from fusion_core.workers import WorkerPool
from tests import common_ground_jobs as jobs
from tests import graph_group_jobs, odd_registries
from tests.corpus.case import ADD

pytestmark = pytest.mark.timeout(240)  # a hang is what must not be

ACME = ["acme.add", "acme.add"]
CORE = [f"reference.{ADD}", f"reference.{ADD}"]
NEITHER = [None, None, None]  # and not merged
ERROR = 0.1  # of bfloat16 values around 4


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        pool.run(odd_registries.keep_tables_in, str(tmp_path_factory.mktemp("tables")))
        yield pool


@pytest.fixture(scope="module")
def three() -> Iterator[WorkerPool]:
    with WorkerPool(3) as pool:
        yield pool


def assert_alike(found: list[jobs.Found], strategies: list[str | None]) -> jobs.Found:
    first, *others = found
    for each in found:
        assert each.strategies == strategies
        assert each.merged == ([] if strategies == NEITHER else [2])
        assert each.error is None or each.error < ERROR
        assert each.again[1] == each.text
    for each in others:
        assert each.warned == first.warned
    return first


BOUND = [pytest.param(True, id="bound", marks=pytest.mark.nightly), pytest.param(False, id="by itself")]
"""Whether ranks agree by `FusionPass.among`; `test_the_outcome_is_part_of_the_cache_key` does that in each run."""

WHOLE = "nothing is fused"
CASES = {
    "nothing": (ACME, ""),
    "strict": (ACME, ""),
    "missing": (CORE, "acme is not used: rank 1 does not have it, rank 0 has acme-kernels 1.0"),
    "failing": (CORE, "acme is not used: rank 1 cannot load it (AttributeError: "),
    "unavailable": (
        CORE,
        "acme is not used: rank 1 cannot use it on cpu (the driver is 1, needs 2), rank 0 has acme-k",
    ),
    "version": (CORE, "acme is not used: rank 1 has acme-kernels 1.1, rank 0 has acme-kernels 1.0"),
    "declaration": (CORE, "acme is not used: rank 1 declares acme.add as "),
    "dialect": (NEITHER, f"{WHOLE}, as acme reads graphs: rank 1 does not have it, rank 0 has acme-kernels 1.0"),
    "order": (NEITHER, f"{WHOLE}: rank 1 has order=('reference'), rank 0 has order=None"),
    "limit": (NEITHER, f"{WHOLE}: rank 1 has limit=1, rank 0 has limit=None, needs the same on every rank; give all"),
    "the same table": (CORE, ""),
    "table": (ACME, "no tuning table is used: rank 1 has /"),
}


@pytest.mark.parametrize("bound", BOUND)
@pytest.mark.parametrize("name", CASES)
def test_ranks_that_differ_choose_alike_and_say_why(two: WorkerPool, name: str, bound: bool) -> None:
    strategies, why = CASES[name]
    found = two.run(jobs.differing, name, bound)
    first = assert_alike(found, strategies)
    for each in found:
        assert ("ranks differ:" in each.text) == bool(why)
        assert why in each.text
        assert ("Ranks differ" in each.again[0]) == bool(why)
    assert [why in text for text in first.warned] == ([True] if why else [])


def test_a_backend_that_ranks_differ_in_is_refused_where_it_loads(two: WorkerPool) -> None:
    here, there = two.run(jobs.differing, "missing", True)
    assert [reason for reason in here.reasons if "acme is not used: rank 1 does not have it" in reason]
    assert there.reasons == []


def test_ranks_are_named_by_their_global_numbers(three: WorkerPool) -> None:
    nobody, *found = three.run(jobs.differing, "missing", True, (1, 2))
    assert nobody is None
    assert "acme is not used: rank 2 does not have it, rank 1 has acme-kernels 1.0" in assert_alike(found, CORE).text


def test_nothing_is_merged_where_a_rank_would_not(two: WorkerPool) -> None:
    here, there = two.run(jobs.differing, "no backend", True)
    for each in (here, there):
        assert each.strategies == NEITHER
        assert each.merged == []
        assert "rank 1 has no backend, rank 0 has a backend" in each.text


@pytest.mark.parametrize("bound", BOUND)
def test_a_rank_that_is_late_is_waited_for(two: WorkerPool, bound: bool) -> None:
    found = two.run(jobs.late, 2.0, jobs.LIMIT, bound)
    assert_alike(found, ACME)
    assert "ranks differ" not in found[0].text


@pytest.mark.parametrize("bound", BOUND)
def test_a_rank_that_is_too_late_comes_to_the_same_outcome(two: WorkerPool, bound: bool) -> None:
    found = two.run(jobs.late, 4.0, 1.0, bound)
    assert "nothing is fused: rank 1 did not take part in the exchange" in assert_alike(found, NEITHER).text
    assert found[1].text.partition("ranks differ:")[2] == found[0].text.partition("ranks differ:")[2]


def test_the_others_go_on_where_a_rank_dies(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**os.environ, "STORE_PORT": str(store.port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    code = "import sys; from tests.common_ground_jobs import dies; dies(sys.argv[1], int(sys.argv[2]))"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(rank)], env=environment) for rank in range(3)
    ]
    try:
        assert [process.wait(120) for process in running] == [0, 0, 9]
    finally:
        for process in running:
            process.kill()
    for rank in range(2):
        strategies, merged, text, seconds = ast.literal_eval((tmp_path / str(rank)).read_text())
        assert (strategies, merged) == (NEITHER, [])
        assert "nothing is fused: rank 2 did not take part in the exchange of facts within 0:00:03" in text
        assert seconds < 60


def test_groups_that_overlap_do_not_wait_for_each_other_in_a_ring(three: WorkerPool) -> None:
    assert max(three.run(jobs.in_a_ring)) < 4


def test_one_time_limit_holds_for_all_groups_of_a_graph(two: WorkerPool) -> None:
    assert 2 <= two.run(jobs.nobody_comes)[0] < 8  # and not 10, one after another


@pytest.mark.parametrize("bound", BOUND)
def test_ranks_exchange_once_for_a_group_and_a_configuration(two: WorkerPool, bound: bool) -> None:
    assert two.run(jobs.exchanges, bound) == [[0, 1, 1, 2]] * 2


def test_a_group_without_a_store_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        group_name = "storeless"

        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 2

    monkeypatch.setattr(common_ground, "is_shared", lambda group: True)
    monkeypatch.setattr(group_store, "PrefixStore", lambda prefix, store: Broken())
    stores: list[tuple[Any, str]] = [(None, "has no store"), (object(), "the store of the group fails (gone)")]
    for store, why in stores:
        group = Group()
        monkeypatch.setattr(common_ground, "resolved", lambda name, group=group: group)
        monkeypatch.setattr(dist.distributed_c10d, "_get_process_group_store", lambda group, store=store: store)
        with pytest.warns(RuntimeWarning, match="nothing is fused"):
            common = common_ground.agree(["storeless"], odd_registries.of())
        (reason,) = common.differences("storeless").whole
        assert why in reason.found


def test_one_that_waits_long_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        group_name = "slow"

        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 2

    group = Group()
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_process_group_store", lambda group: store)
    monkeypatch.setattr(common_ground, "is_shared", lambda group: True)
    monkeypatch.setattr(common_ground, "resolved", lambda name: group)
    monkeypatch.setattr(common_ground, "TIMEOUT", 1.0)
    monkeypatch.setattr(agreement, "PATIENCE", 0.1)
    with pytest.warns(RuntimeWarning) as warned:
        common_ground.agree(["slow"], odd_registries.of())
    first, second = (str(each.message) for each in warned)
    assert first.startswith("fusion_core: waiting for rank 1 in the exchange of facts, 1 s more at most")
    assert "rank 1 did not take part" in second


class Broken:
    """A store whose other end is gone."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("gone")


def test_the_outcome_is_part_of_the_cache_key() -> None:
    with WorkerPool(2) as pool:  # which has no other groups
        (before, after, bound, twice), other = pool.run(jobs.keys)
    assert not before, "a graph must not come from the cache before ranks agree"
    assert (after, bound) == (other[1], other[2])
    assert len({after, bound, twice}) == 3


def test_a_group_that_the_graph_did_not_show_is_left_alone(two: WorkerPool) -> None:
    text = assert_alike(two.run(jobs.hidden), NEITHER).text
    assert "nothing is fused: the graph does not show this process group before it is compiled" in text


def test_the_groups_of_a_graph_are_seen_before_it_is_lowered(two: WorkerPool) -> None:
    for found in two.run(graph_group_jobs.shown):
        for form, (names, wanted) in found.items():
            assert names == wanted, form


def test_groups_without_other_ranks_ask_nobody(two: WorkerPool) -> None:
    assert two.run(graph_group_jobs.pretended) == [(True, True)] * 2


def test_eager_functions_agree_too(two: WorkerPool) -> None:
    for name, calls in (("nothing", 2), ("missing", 0), ("limit", 0)):
        for called, error in two.run(jobs.eager, name):
            assert called == calls
            assert error < ERROR


@pytest.mark.nightly  # `test_the_outcome_is_part_of_the_cache_key` guards the same without three starts of two ranks
@pytest.mark.timeout(600)
def test_a_rank_that_hits_inductors_cache_chooses_as_those_that_miss(tmp_path: Path) -> None:
    """What one rank has in its cache from a run in which all agreed is not what runs where they differ."""
    warm, cold, colder = ([str(tmp_path / f"{name}{rank}") for rank in range(2)] for name in ("warm", "cold", "colder"))

    def run(caches: list[str], odd: bool) -> list[tuple[str, list[str | None], str, float]]:
        with WorkerPool(2) as pool:
            found = pool.run(jobs.started, caches, odd)
        assert max(error for *_, error in found) < ERROR
        return found

    first = ["reference.all_reduce"]  # of the two that could be merged
    for origin, strategies, *_ in run(warm, False):
        assert (origin, strategies) == ("compiled", first + ACME)
    (hit, ours, *_), (miss, theirs, *_) = run([warm[0], cold[1]], False)
    assert (hit, miss) == ("cache", "compiled")
    assert ours == theirs == first + ACME
    for origin, strategies, text, _ in run([warm[0], colder[1]], True):
        assert (origin, strategies) == ("compiled", first + CORE)
        assert "acme is not used: rank 1 does not have it" in text
