"""Every place that a user can write is found, and no answer gets worse.

A failing example is printed as a `Case`; ``up_to_the_graph`` of ``tests.properties.jobs`` runs it on every rank.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import example, given, settings

from tests.properties import jobs, strategies
from tests.properties.cases import Case

EXAMPLES = settings().max_examples  # of the profile


BASE = Case(
    pattern="all_reduce_add_rms_norm",
    shape=(4, 64),
    dtype=torch.float32,
    residual_dtype=torch.float32,
    layout="contiguous",
    eps=1e-3,
    weight="same",
    weight_bias=1.0,
    spelling="hugging_face",
    residual_first=False,
    flattened=False,
    in_place=False,
    live=("normed", "residual_out"),
    values="normal",
    dynamic=False,
    seed=1,
    world_size=2,
)

LAYER = dataclasses.replace(BASE, pattern="all_reduce_add_layer_norm", spelling="cohere", bias=True)


def check(outcomes):
    """What holds on each rank whatever the way to the graph."""
    for rank, outcome in enumerate(outcomes):
        for name, (fused, unfused) in outcome.forms.items():
            assert fused == unfused, f"rank {rank}: {name} is {fused}, unfused {unfused}"
        for name, excess in outcome.excess.items():
            assert excess <= 1.0, f"rank {rank}: the error of {name} is {excess:.3g} times what it may be"
    assert all(outcome.excess == outcomes[0].excess for outcome in outcomes), "ranks have other results"


def check_sites(case, sites, strategy):
    assert len(sites) == 1, sites
    (site,) = sites
    assert site.pattern == case.found, str(site)
    assert site.strategy == strategy
    assert set(site.attributes["live"]) == case.found_live
    assert site.attributes["world_size"] == case.world_size
    assert site.attributes["inputs"]["x"].startswith(str(case.dtype).removeprefix("torch."))
    assert ("bias" in site.attributes["inputs"]) == (case.has_bias and case.found != "all_reduce")
    if case.found in ("all_reduce", "all_reduce_bias"):
        return
    # F.rms_norm's own decomposition rounds eps to float32; a sum over n draws a factor out of it
    accuracy = 1e-7 if case.spelling == "functional" else 1e-12
    assert math.isclose(site.attributes["eps"], case.eps, rel_tol=accuracy)
    assert site.attributes["weight_bias"] == case.weight_bias
    assert ("weight" in site.attributes["inputs"]) == (case.weight != "none")
    if case.has_residual:
        assert site.attributes["inputs"]["residual"].startswith(str(case.residual_dtype).removeprefix("torch."))


@settings(max_examples=EXAMPLES)
@given(case=strategies.cases())
@example(case=dataclasses.replace(BASE, eps=0.1, values="small"))  # all hangs on eps
def test_every_place_is_found_and_no_answer_gets_worse(pools, case):
    outcomes = pools.run(case.world_size, jobs.up_to_the_graph, case)
    check(outcomes)
    for outcome in outcomes:
        check_sites(case, outcome.sites, f"reference.{case.found}")
        assert outcome.collectives == (1, 1)
        check_sites(case, outcome.sites_without_backends, None)
        assert outcome.untouched, "nothing was chosen, and the graph is another"


@settings(max_examples=EXAMPLES)
@given(case=strategies.centred())
@example(case=dataclasses.replace(LAYER, eps=0.1, values="small"))
def test_every_layer_norm_and_every_bias_is_found_and_no_answer_gets_worse(pools, case):
    outcomes = pools.run(case.world_size, jobs.up_to_the_graph, case)
    check(outcomes)
    for outcome in outcomes:
        check_sites(case, outcome.sites, f"reference.{case.found}")
        assert outcome.collectives == (1, 1)
        check_sites(case, outcome.sites_without_backends, None)
        assert outcome.untouched, "nothing was chosen, and the graph is another"


@pytest.mark.nightly  # `tests/corpus/test_explained_is_placed.py` has each pattern through all of Inductor
@settings(max_examples=max(EXAMPLES // 25, 2))
@given(case=strategies.cases(world_sizes=(2,)))
def test_the_same_through_all_of_inductor(pools, case):
    outcomes = pools.run(case.world_size, jobs.through_inductor, case)
    check(outcomes)
    for outcome in outcomes:
        check_sites(case, outcome.sites, f"reference.{case.found}")
        assert outcome.collectives == (1, 1)


@settings(max_examples=EXAMPLES)
@given(drawn=strategies.quantized())
def test_a_quantised_pattern_called_by_hand_is_no_worse_than_its_words(pools, drawn):
    case, options = drawn
    check(pools.run(case.world_size, jobs.eagerly, case, options))


@pytest.mark.parametrize("case", [BASE, LAYER], ids=lambda case: case.pattern)
@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (1.01, False)])
def test_the_bound_notices_another_epsilon(pools, case, factor, holds):
    for excess in pools.run(2, jobs.with_another_eps, case, factor):
        assert excess["residual_out"] <= 1.0
        assert (excess["normed"] <= 1.0) == holds
