"""Which strategies AITER has: for which kernels, which is preferred, what is off unless asked for."""

import pytest

from fusion_aiter.strategies import UNTESTED
from fusion_core import FusionConfig
from tests.aiter_backend.sites import ASKED, PATTERNS, PLAIN, STRATEGIES

pytestmark = pytest.mark.usefixtures("nothing_is_imported")


def test_a_plain_strategy_for_every_kernel_and_one_to_ask_for_where_there_are_stages():
    starts = ("all_reduce_rms_norm", "all_reduce_add_rms_norm")
    ends = ("", "_token_fp8", "_token_fp8_out", "_group_fp8", "_group_fp8_out", "_mxfp4", "_mxfp4_out")
    fused = {f"aiter.{start}{end}" for start in starts for end in ends}
    assert [len(PLAIN), len(ASKED)] == [15, 14]
    assert {strategy.name for strategy in PLAIN} == {"aiter.all_reduce", *fused}
    assert {strategy.name for strategy in ASKED} == {f"{name}_one_stage" for name in fused}
    for strategy in STRATEGIES:
        assert strategy.pattern == strategy.name.removeprefix("aiter.").removesuffix("_one_stage").removesuffix("_out")
    kinds = {"static_fp8", "nvfp4"}
    lacking = {f"{start}_{kind}" for start in starts for kind in kinds} | {"all_reduce_rms_norm_add_rms_norm"}
    lacking |= {"all_reduce_bias", *(name for name in PATTERNS if "layer_norm" in name)}
    assert {strategy.pattern for strategy in PLAIN} == {
        name for name in PATTERNS if name.startswith("all_reduce")
    } - lacking


def test_nobody_ran_any_of_them_on_hardware():
    assert UNTESTED
    assert {strategy.untested for strategy in STRATEGIES} == {UNTESTED}


def test_options_are_off_unless_switched_on():
    for strategy in PLAIN:
        assert strategy.switched_off(FusionConfig()) == ()
    for strategy in ASKED:
        assert strategy.switch == "aiter.one_stage"
        (reason,) = strategy.switched_off(FusionConfig())
        assert str(reason).startswith("the option aiter.one_stage is off")
        assert strategy.switched_off(FusionConfig(options=("aiter.one_stage",))) == ()


def test_what_is_preferred():
    """What the user asked for before what he did not; without the norm before with it."""
    for pattern in {strategy.pattern for strategy in STRATEGIES}:
        ranks = {strategy.name: strategy.rank for strategy in STRATEGIES if strategy.pattern == pattern}
        assert len(set(ranks.values())) == len(ranks)
        for name, rank in ranks.items():
            if name.endswith("_one_stage"):
                assert rank > ranks[name.removesuffix("_one_stage")]
            if "_out" in name:
                assert rank < ranks[name.replace("_out", "")]
