"""Vectors that an all_gather makes whole although each rank uses its own part: what is sent instead, or why not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.sharded import layers
from tests.support.oracle import check_examples

NORM, PAIR, IDENTITY = "sharded_rms_norm", "sharded_rms_norm_pair", "all_gather_shard"
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"

WHOLE = "is the norm of whole vectors, of which more than the rank's part is used"

# Layer → the patterns that are fused, the gathers and all_reduces of a call, and the bytes of a token before and after.
FUSED = {
    "a norm": ([NORM], 0, 1, [(128, 4)]),
    "torch.distributed": ([NORM], 0, 1, [(128, 4)]),
    "a list": ([NORM], 0, 1, [(128, 4)]),
    "without weight": ([NORM], 0, 1, [(128, 4)]),
    "no norm": ([IDENTITY], 0, 0, [(64, 0)]),
    "two norms": ([PAIR], 0, 1, [(192, 8)]),
    "attention": ([PAIR, IDENTITY], 0, 1, [(192, 8), (64, 0)]),
    "attention by hand": ([PAIR, IDENTITY], 0, 1, [(192, 8), (64, 0)]),
}

LONG = ("attention", "attention by hand")

REFUSED = {
    "another order": "joins the parts [1, 0], needs the order of the ranks",
    "smaller parts": WHOLE,
    "used whole": "inside the chain is used by",
    "normed whole": WHOLE,
}


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, timeout=300.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [(name, dynamic) for name in FUSED for dynamic in (False, True) if not (dynamic and name in LONG)],
)
def test_a_number_is_sent_instead_of_the_vector(pool: WorkerPool, name: str, dynamic: bool) -> None:
    patterns, gathers, reductions, sent = FUSED[name]
    for found in pool.run(layers.run, name, torch.float32, dynamic):
        sites = found.report.sites
        assert [(site.pattern, site.strategy) for site in sites] == [(each, f"reference.{each}") for each in patterns]
        assert (found.fused["all_gather"], found.fused["all_reduce"]) == (gathers, reductions)
        assert (found.unfused["all_gather"], found.unfused["all_reduce"]) == (sum(2 - (p != PAIR) for p in patterns), 0)
        assert [(s.attributes["gathered_bytes"], s.attributes["sent_bytes"]) for s in sites] == sent
        assert found.error <= found.own_error + 2e-6


def test_only_the_all_reduce_is_inside_an_operator(pool: WorkerPool) -> None:
    """Else eager kernels compute the norms, a dozen of them, where Inductor makes one with what follows."""
    for found in pool.run(layers.run, "two norms"):
        assert found.operators.count("aten.rsqrt.default") == 2


@pytest.mark.parametrize("name", [NORM, PAIR])
def test_where_an_operator_picks_one_of_several_strategies_it_runs_the_whole_one(pool: WorkerPool, name: str) -> None:
    assert all(error <= 2e-6 for error in pool.run(layers.by_a_path, name))


@pytest.mark.parametrize("agreed", [True, False])
def test_the_sum_of_the_means_is_in_the_operator_s_argument(pool: WorkerPool, agreed: bool) -> None:
    """And its result is other memory: Inductor reuses the argument's once nothing reads it."""
    assert pool.run(layers.means_by_the_operator, agreed) == [(True, True)] * 2


@pytest.mark.parametrize("name", FUSED)
def test_in_bfloat16_the_result_is_as_near_to_float64(pool: WorkerPool, name: str) -> None:
    for found in pool.run(layers.run, name, torch.bfloat16):
        assert [site.pattern for site in found.report.fused] == FUSED[name][0]
        assert found.error <= found.own_error + 2**-7


def test_a_norm_in_float32_of_a_narrower_vector(pool: WorkerPool) -> None:
    for found in pool.run(layers.run, "in float32", torch.bfloat16):
        assert [site.pattern for site in found.report.fused] == [NORM]
        assert found.error <= found.own_error + 2**-7


@pytest.mark.parametrize("name", REFUSED)
def test_why_a_vector_is_sent_whole(pool: WorkerPool, name: str) -> None:
    for found in pool.run(layers.run, name):
        assert not found.report.fused
        said = [str(miss.reason) for site in found.report.sites for miss in site.near_misses]
        assert any(REFUSED[name] in reason for reason in said), said
        assert found.fused == found.unfused
        assert found.error == found.own_error


def test_the_part_of_another_rank_is_never_taken_for_the_own_one() -> None:
    with WorkerPool(2, timeout=300.0) as pool:  # without graphs that were agreed on before
        one, other = pool.run(layers.another_ranks_part)
    assert "is the part of rank 0, on rank 1, needs the rank's own part" in other.said
    assert any("runs unfused from now on" in each for each in one.warnings)  # the other rank has no kernel
    for found in (one, other):
        assert found.error <= 2e-6
        assert found.calls == {"all_gather": 1}


@pytest.mark.parametrize("name", ["gathered whole", "two in one", "three in one"])
def test_a_gather_of_which_several_parts_are_used_is_no_site(pool: WorkerPool, name: str) -> None:
    """As of gate and up projections, or of queries, keys and values, that are one weight."""
    for found in pool.run(layers.run, name):
        assert not found.report.sites
        assert found.fused == found.unfused


def test_what_a_cache_keeps_is_gathered_whole_and_the_queries_are_not(pool: WorkerPool) -> None:
    for found in pool.run(layers.run, "attention and a cache"):
        assert [site.pattern for site in found.report.fused] == [PAIR]
        assert (found.fused["all_gather"], found.unfused["all_gather"]) == (1, 3)
        assert found.error <= found.own_error + 2e-6


def test_without_a_backend_nothing_changes(pool: WorkerPool) -> None:
    for found in pool.run(layers.run, "attention", torch.float32, False, ()):
        assert found.fused == found.unfused
        assert found.operators.count(ATTENTION) == 1
        assert found.error <= found.own_error + 2e-6


@pytest.mark.parametrize(
    ("name", "dynamic"), [pytest.param("attention", False, marks=pytest.mark.nightly), ("two norms", True)]
)
def test_all_of_inductor_places_what_explain_names(pool: WorkerPool, name: str, dynamic: bool) -> None:
    patterns = FUSED[name][0]
    for found in pool.run(layers.through_inductor, name, dynamic):
        assert found.text == f"fusion_core: {len(patterns)} of {len(patterns)} collectives on a kernel, on 2 x cpu"
        assert found.explained == found.placed == [(each, f"reference.{each}") for each in patterns]
        assert found.error <= 2e-6


def test_on_four_ranks() -> None:
    with WorkerPool(4, timeout=300.0) as pool:
        for found in pool.run(layers.run, "attention"):
            assert [site.pattern for site in found.report.fused] == [PAIR, IDENTITY]
            assert (found.fused["all_gather"], found.fused["all_reduce"]) == (0, 1)
            assert found.error <= found.own_error + 2e-6


def test_ranks_that_run_different_graphs_get_right_numbers() -> None:
    with WorkerPool(2, timeout=300.0) as pool:
        by_rank = pool.run(layers.ranks_differ)
    for found in by_rank:
        assert found.error <= 2e-6
        assert any("runs unfused from now on" in each for each in found.warnings)
        assert found.calls == {"all_gather": 2}


def test_a_graph_of_another_rank_is_an_error(pool: WorkerPool) -> None:
    for rank, text in enumerate(pool.run(layers.on_another_rank)):
        assert f"a graph of rank {1 - rank} of group" in text
        assert f"came from the compile cache on rank {rank}" in text


@pytest.mark.parametrize("name", [NORM, PAIR, IDENTITY, "all_reduce_rms_norm_add_rms_norm"])
def test_examples_against_float64(name: str) -> None:
    check_examples(name)
