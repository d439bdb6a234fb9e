"""Which strategies FlashInfer has: for which kernels and forms, which is preferred, what each is marked with."""

import pytest

from fusion_core import FusionConfig
from fusion_flashinfer import strategies
from fusion_flashinfer.kernels import KERNELS
from fusion_flashinfer.requirements import MoreRowsThanRanks, OneCluster, VectorForEachRank
from tests.flashinfer_backend.sites import PATTERNS, PLAIN, STRATEGIES, is_two_shot, kernel_of, many_registers

pytestmark = pytest.mark.usefixtures("nothing_is_imported")


def test_there_is_a_kernel_for_every_pattern_but_mxfp4_two_norms_layer_norm_and_a_bias():
    lacking = {name for name in PATTERNS if "mxfp4" in name or "layer_norm" in name}
    lacking |= {"all_reduce_rms_norm_add_rms_norm", "all_reduce_bias"}
    assert {s.pattern for s in STRATEGIES} == {name for name in PATTERNS if name.startswith("all_reduce")} - lacking
    assert {s.option for s in STRATEGIES} == {None, "pdl", "mnnvl"}
    assert not [s.name for s in STRATEGIES if "group_fp8" in s.name and s.option == "mnnvl"]


def test_every_kernel_has_a_strategy_for_each_form():
    names = [s.name for s in STRATEGIES]
    assert len(set(names)) == len(names)
    for kernel in KERNELS:
        forms = ["", "_two_shot", "_pdl", "_two_shot_pdl"] + ["_mnnvl"] * (kernel.quantization != "group_fp8")
        expected = {f"flashinfer.{kernel.name}{form}" for form in forms}
        assert {s.name for s in STRATEGIES if kernel_of(s) is kernel} == expected


def test_what_is_preferred():
    """What the user asked for before what he did not, one-shot before two-shot, without the norm before with it."""
    for pattern in {strategy.pattern for strategy in STRATEGIES}:
        ranks = {strategy.name: strategy.rank for strategy in STRATEGIES if strategy.pattern == pattern}
        assert len(set(ranks.values())) == len(ranks)
        for name, rank in ranks.items():
            plain = name.removesuffix("_pdl").removesuffix("_mnnvl")
            assert (rank > ranks[plain]) == (name != plain)
            if "_two_shot" in name:
                assert rank < ranks[name.replace("_two_shot", "")]
            if "_out" in name:
                assert rank < ranks[name.replace("_out", "")]


def test_the_one_shot_sum_alone_is_batch_invariant():
    """With a norm the kernels share a row between more or fewer blocks as there are fewer or more rows."""
    assert [s.name for s in STRATEGIES if s.batch_invariant] == ["flashinfer.all_reduce"]
    (strategy,) = [s for s in STRATEGIES if s.batch_invariant]
    config = FusionConfig(numerics="deterministic", max_tokens=8)
    assert strategy.settings(PATTERNS["all_reduce"], config) == {"max_tokens": 8, "numerics": "deterministic"}


def test_the_two_forms_and_pdl_require_the_same():
    by_name = {s.name: s for s in STRATEGIES}
    for strategy in PLAIN:
        assert by_name[f"{strategy.name}_pdl"].requires == strategy.requires
        one_shot = by_name[strategy.name.removesuffix("_two_shot")]
        more = [VectorForEachRank("x"), MoreRowsThanRanks("x")] if is_two_shot(strategy) else []
        more += [OneCluster("x", 512)] if many_registers(strategy) else []
        assert [each for each in strategy.requires if each not in one_shot.requires] == more
        assert [each for each in one_shot.requires if each not in strategy.requires] == []


def test_what_nobody_ran_on_hardware_is_marked():
    for strategy in STRATEGIES:
        expected = [strategies.UNTESTED_FP4] if "nvfp4" in strategy.name else []
        expected += [strategies.UNTESTED_MNNVL] if strategy.option == "mnnvl" else []
        assert strategy.untested == ("; ".join(expected) or None)
