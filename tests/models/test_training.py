"""A training step: gradients stay what they are, and every chain that autograd looks into says so."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models.architectures import SITES
from tests.models.training_jobs import Training, train

pytestmark = pytest.mark.nightly  # a training graph of one site is in `test_dynamic_fp8.py` and `test_emission.py`


@pytest.fixture(scope="module")
def training(pool: WorkerPool, checkpoint: Callable[[str], Path]) -> list[Training]:
    return pool.run(train, checkpoint("llama"))


def test_gradients_are_as_near_to_float64_as_without_fusion(training: list[Training]):
    for rank in training:
        for name, exact in rank.exact.items():
            fused, unfused = (float((each[name].double() - exact).abs().max()) for each in (rank.fused, rank.unfused))
            # sums of some thousand products in float32: a few ulps of the largest gradient may be chance
            few_ulps = 4 * torch.finfo(torch.float32).eps * float(exact.abs().max())
            assert fused <= 1.2 * unfused + few_ulps, name
            assert unfused < 1e-4 * float(exact.abs().max()), f"{name} is wrong without fusion"
        assert rank.losses == pytest.approx((rank.losses[2],) * 3, rel=1e-6)


def test_a_training_step_reduces_as_often_as_without_fusion_but_for_what_is_merged(training: list[Training]):
    for rank in training:
        fused, unfused = rank.calls
        merges = [merge["nodes"] for report in rank.reports for merge in report["merges"] if not merge["reasons"]]
        # backward: what q, k and v give their input, and gate and up theirs
        assert sorted(map(len, merges)) == [2, 2, 3, 3]
        assert fused == unfused - Counter({"all_reduce": sum(len(nodes) - 1 for nodes in merges)})
        assert fused["all_reduce"] > SITES


def test_a_chain_whose_inside_autograd_saves_is_left_and_says_which_value(training: list[Training]):
    for rank in training:
        forward, backward = rank.reports
        assert len(forward["sites"]) == SITES
        for index, site in enumerate(forward["sites"]):
            longest = "all_reduce_rms_norm" if index == 0 else "all_reduce_add_rms_norm"
            (miss,) = site["near_misses"]
            reason = miss["reason"]
            assert (miss["pattern"], reason["code"]) == (longest, "live_value")
            # autograd keeps 1 / rms of each norm: an output of the forward graph, which no pattern has
            assert reason["found"].startswith("rsqrt")
            assert reason["found"].endswith("is used by output")
            assert site["strategy"] == "reference.all_reduce", "the sum itself can still run on a backend"
        # in the backward the sums are of gradients: none of them is normed
        assert {site["pattern"] for site in backward["sites"]} == {"all_reduce"}
