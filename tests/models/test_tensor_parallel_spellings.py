"""Every way of torch to write an all_reduce, on two processes: what is recognised, and that the answers stay."""

from collections.abc import Callable

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models.spellings import SPELLINGS, Ran, run

FUSED = ("all_reduce_add_rms_norm", {"normed", "residual_out"})

# Spelling → the sites as pattern and live outputs.
RECOGNISED = {
    "functional": [FUSED],
    "functional_over_a_mesh": [FUSED],
    "waited_for_at_once": [FUSED],
    "waited_for_at_a_distance": [FUSED],
    "waited_for_twice": [FUSED],
    "coalesced_alone": [FUSED],
    "two_groups": [FUSED, FUSED],
    "in_place": [FUSED],
    "in_place_with_arguments": [FUSED],
    "in_place_on_a_view": [FUSED],
    "in_place_on_an_input": [(FUSED[0], {"normed", "residual_out", "reduced"})],  # the caller sees it written
    "in_place_in_two_groups": [FUSED, FUSED],
    "in_place_under_a_coalescing_manager": [FUSED, ("all_reduce", {"reduced"})],  # traced one by one
    "dtensor_parallel_styles": [FUSED],
}
# Spelling → the number of sites, the code of the reason why none is fused, and what its words name.
REFUSED = {
    "mean_over_ranks": (1, "reduce_op", "avg"),
    "coalesced_with_another": (2, "collective", "all_reduce_coalesced"),
    "scattered_and_gathered": (1, "reduce_scatter", "reduce_scatter"),
}
# Spelling → what torch 2.13 says of it. Its all_reduces never stand in a graph; where torch learns it, it is a row above.
NOT_TRACED = {
    "asynchronous": "async_op=True for distributed collectives",
    "operator_that_writes": "custom (non-ATen) operator whose output has alias annotations",
}

Rans = Callable[..., list[Ran]]


@pytest.fixture(scope="module")
def ran(pool: WorkerPool) -> Rans:
    """What came of a spelling on each rank; runs on first use."""
    found: dict[tuple[str, bool], list[Ran]] = {}

    def get(name: str, fullgraph: bool = True) -> list[Ran]:
        if (name, fullgraph) not in found:
            found[name, fullgraph] = pool.run(run, name, fullgraph)
        return found[name, fullgraph]

    return get


def assert_answers_stay(rank: Ran) -> None:
    torch.testing.assert_close(rank.fused, rank.eager)
    assert rank.fused_calls == rank.unfused_calls, "collectives that reached the process group"


def test_every_spelling_has_a_row():
    assert {*RECOGNISED, *REFUSED, *NOT_TRACED} == SPELLINGS.keys()


@pytest.mark.parametrize("name", RECOGNISED)
def test_it_is_fused(ran: Rans, name: str):
    for rank in ran(name):
        assert not rank.error
        found = [(site["pattern"], set(site["attributes"].get("live", ()))) for site in rank.sites]
        assert found == RECOGNISED[name]
        assert all(site["strategy"] for site in rank.sites)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_left_and_says_why(ran: Rans, name: str):
    count, code, words = REFUSED[name]
    for rank in ran(name):
        assert len(rank.sites) == count
        for site, reasons in zip(rank.sites, rank.reasons, strict=True):
            assert site["strategy"] is None
            assert any(reason["code"] == code and words in reason["found"] for reason in reasons), reasons


@pytest.mark.parametrize("name", [*RECOGNISED, *REFUSED])
def test_answers_and_collectives_stay(ran: Rans, name: str):
    for rank in ran(name):
        assert_answers_stay(rank)


@pytest.mark.parametrize("name", ["two_groups", "in_place_in_two_groups"])
def test_each_site_has_its_own_group(ran: Rans, name: str):
    for rank in ran(name):
        assert rank.groups[0] != rank.groups[1]
        assert tuple(site["attributes"]["group"] for site in rank.sites) == rank.groups


@pytest.mark.parametrize("name", NOT_TRACED)
def test_torch_itself_does_not_trace_it(ran: Rans, name: str):
    for rank in ran(name):
        assert NOT_TRACED[name] in rank.error
        assert not rank.sites


def test_an_asynchronous_all_reduce_breaks_the_graph_and_runs_outside(ran: Rans):
    for rank in ran("asynchronous", fullgraph=False):
        assert not rank.error
        assert rank.graphs == 3  # before the call, up to wait(), and behind it
        assert not rank.sites
        assert_answers_stay(rank)
