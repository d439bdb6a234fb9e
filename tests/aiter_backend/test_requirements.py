"""What AITER's strategies accept and refuse, by the reasons' words; no GPU and no AITER is needed."""

from dataclasses import replace

import pytest

from fusion_aiter.kernels import KERNELS
from fusion_core import Device
from tests.aiter_backend.sites import (
    ASKED,
    E4M3,
    E4M3FNUZ,
    FP16,
    FP32,
    FP64,
    MI355,
    PLAIN,
    STRATEGIES,
    given,
    hidden,
    kernel_of,
    live,
    older,
    said,
    should_not,
    site_of,
    sized,
    typed,
    without,
)
from tests.support.symbols import symbolic

pytestmark = pytest.mark.usefixtures("nothing_is_imported")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_every_strategy_has_a_site_that_it_can_and_should_run(strategy):
    site = site_of(strategy)
    assert said(strategy, site) == []
    assert should_not(strategy, site) == []
    assert said(strategy, older(sized(site, 4, 512))) == []


ACCEPTED = {
    "float16": lambda site: typed(site, FP16),
    "no rows": lambda site: sized(site, 0, 512),
    "one dimension": lambda site: sized(site, 512),
    "four dimensions": lambda site: sized(site, 2, 3, 4, 512),
    "hidden 7168": lambda site: sized(site, 4, 7168),
    "hidden 8192": lambda site: sized(site, 4, 8192),
    "four ranks": lambda site: replace(site, world_size=4),
    "eight ranks": lambda site: replace(site, world_size=8),
    "no least scale": lambda site: given(site, min_scale=None) if "min_scale" in site.attributes else site,
    "the least scale of vLLM": lambda site: (
        given(site, min_scale=1 / (448 * 512)) if "min_scale" in site.attributes else site
    ),
    "fp8_max that is the format's own": lambda site: (
        given(site, fp8_max=448.0) if "fp8_max" in site.attributes else site
    ),
    "memory that is not contiguous, which the operator copies": lambda site: replace(
        site, inputs={**site.inputs, "x": replace(site.inputs["x"], stride=(1, 4))}
    ),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("strategy", PLAIN, ids=lambda strategy: strategy.name)
def test_accepted(strategy, change):
    assert said(strategy, change(site_of(strategy))) == []


def test_float32_where_nothing_is_quantised():
    for strategy in PLAIN:
        if not kernel_of(strategy).quantization:
            assert said(strategy, typed(site_of(strategy), FP32)) == []


def test_a_weight_bias_of_1_where_there_is_a_kernel_of_gemmas():
    assert {s.name for s in PLAIN if "weight_bias" in site_of(s).attributes and said(s, given(site_of(s), weight_bias=1.0)) == []} == {
        f"aiter.{kernel.name}" for kernel in KERNELS if kernel.norms and kernel.quantization in ("", "token_fp8")
    }  # fmt: skip


def everywhere(kernel):
    return True


def norms(kernel):
    return kernel.norms


def adds(kernel):
    return kernel.adds


def quantises(kernel):
    return bool(kernel.quantization)


def fp8(kernel):
    return kernel.quantization.endswith("fp8")


def only(*quantizations):
    return lambda kernel: kernel.norms and kernel.quantization in quantizations


def gives_norm(kernel):
    return kernel.norm_out


def gives_no_norm(kernel):
    return quantises(kernel) and not kernel.norm_out


HALF = "bfloat16 or float16"
ASK = "the option aiter.one_stage allows it"
REFUSED = [
    (everywhere, lambda s: replace(s, device=Device("cuda", "gfx90a")), "device is cuda (gfx90a), needs gfx942 or gfx950",
     "MI200 has no fused kernels"),
    (everywhere, lambda s: replace(s, device=Device("cuda", "sm_90")), "device is cuda (sm_90), needs gfx942 or gfx950", ""),
    (everywhere, lambda s: replace(s, device=Device("cuda", "gfx1250")), "device is cuda (gfx1250), needs gfx942 or",
     "aiter#4812: another C++ class behind the same pointer"),
    *((everywhere, lambda s, ranks=ranks: replace(s, world_size=ranks), f"world size is {ranks}, needs 2, 4 or 8",
       "the constructor takes 6, the fused kernels do not") for ranks in (1, 3, 6, 16)),
    (everywhere, lambda s: typed(s, FP64), "x is float64, needs bfloat16", "the kernels know three dtypes"),
    (quantises, lambda s: typed(s, FP32), f"x is float32, needs {HALF}", "no quantising kernel takes float32"),
    (norms, lambda s: typed(s, FP32, "weight"), "weight is float32, needs bfloat16, the dtype of x", "vLLM#48324: garbage"),
    (norms, lambda s: typed(s, FP16, "weight"), "weight is float16, needs bfloat16, the dtype of x", "vLLM#48324"),
    (adds, lambda s: typed(s, FP32, "residual"), "residual is float32, needs bfloat16, the dtype of x", "vLLM#48324"),
    (norms, lambda s: without(s, "weight"), "there is no weight, needs one", ""),
    (adds, lambda s: given(s, residual_dtype=FP32), "residual_dtype is float32, needs bfloat16", "it comes in x's dtype"),
    (only(""), lambda s: given(s, norm_dtype=FP32), "norm_dtype is float32, needs bfloat16", ""),
    (gives_norm, lambda s: live(given(s, norm_dtype=FP32), "normed"), "normed is float32, needs bfloat16, the dtype of x",
     "who reads the norm itself reads it as the model has it"),
    (gives_no_norm, lambda s: live(s, "normed"), "normed is used outside the site, needs no other live", ""),
    (adds, lambda s: live(s, "reduced"), "reduced is used outside the site, needs no other live outputs", ""),
    # rows
    (lambda k: not k.norms, lambda s: hidden(s, 20), "x.shape[-1] is 20, needs a multiple of 8", "16 bytes"),
    (norms, lambda s: hidden(s, 20), "x.shape[-1] is 20, which AITER has no kernel for at 2 ranks", "16 bytes"),
    (norms, lambda s: hidden(s, 8200), "x.shape[-1] is 8200, which AITER has no kernel for at 2 ranks", "1025 packs"),
    (norms, lambda s: hidden(s, 16392), "x.shape[-1] is 16392, which AITER has no kernel for at 2 ranks, needs a multiple of",
     "a printf and outputs that stay uninitialised"),
    (quantises, lambda s: hidden(s, 16384), "x.shape[-1] is 16384, which AITER has no kernel for at 2 ranks", "1024 threads"),
    (only("token_fp8", "group_fp8"), lambda s: older(hidden(s, 2880)),
     "x.shape[-1] is 2880, which AITER only takes in one stage at 2 ranks, needs a multiple of 256 from 256 to 8192; " + ASK,
     "a last part of a warp is left out of the sum of squares"),
    (only(""), lambda s: older(hidden(s, 504)),
     "x.shape[-1] is 504, which AITER only takes in one stage at 2 ranks, needs a multiple of 16 from 512 to 16384; " + ASK, ""),
    # quantisation
    *((only("group_fp8"), lambda s, size=size: given(s, group_size=size),
       f"group_size is {size}, needs 8, 16, 32, 64, 128, 256 or 512", "a power of two of packs, a wavefront at most")
      for size in (4, 24, 96, 1024)),
    (only("group_fp8"), lambda s: given(hidden(s, 768), group_size=512), "x.shape[-1] is 768, needs a multiple of 512", ""),
    (fp8, lambda s: given(s, fp8_dtype=E4M3FNUZ), "fp8_dtype is float8_e4m3fnuz, needs float8_e4m3fn", "gfx950 has OCP's"),
    (fp8, lambda s: given(older(s), fp8_dtype=E4M3), "fp8_dtype is float8_e4m3fn, needs float8_e4m3fnuz", "gfx942 has not"),
    (fp8, lambda s: given(s, fp8_max=224.0), "fp8_max is 224.0, needs 448", ""),
    (fp8, lambda s: given(older(s), fp8_max=448.0), "fp8_max is 448.0, needs 240", ""),
    (fp8, lambda s: given(s, min_scale=1e-3), "min_scale is 0.001, needs at most 8.14e-06", "AITER has no floor"),
    (only("", "token_fp8"), lambda s: given(s, weight_bias=0.5), "weight_bias is 0.5, needs 0.0 or 1.0", "Gemma's or none"),
    (only("group_fp8", "mxfp4"), lambda s: given(s, weight_bias=1.0), "weight_bias is 1.0, needs 0.0",
     "gemma_norm: no kernel that quantises by groups has it"),
    (only("group_fp8"), lambda s: given(s, scale_format="ue8m0"), "scale_format is ue8m0, needs float32", ""),
    (only("group_fp8"), lambda s: given(s, scale_format="ue8m0_packed"), "scale_format is ue8m0_packed, needs float32", ""),
    (only("mxfp4"), lambda s: given(s, scale_rounding="up"), "scale_rounding is up, needs even", "even, not RoundUp"),
]  # fmt: skip


@pytest.mark.parametrize(("applies", "change", "words", "why"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refused(applies, change, words, why):
    asked = [strategy for strategy in PLAIN if applies(kernel_of(strategy))]
    assert asked
    for strategy in asked:
        found = said(strategy, change(site_of(strategy)))
        assert any(each.startswith(words) for each in found), (strategy.name, found)


def test_what_is_only_taken_in_one_stage_is_taken_where_the_user_asks():
    for strategy in ASKED:
        kernel, site = kernel_of(strategy), site_of(strategy)
        width = 2880 if kernel.quantization.endswith("fp8") else 504 if not kernel.quantization else 2880
        changed = hidden(given(site, group_size=64) if kernel.quantization == "group_fp8" else site, width)
        assert said(strategy, changed) == []
        assert said(strategy, hidden(site, 8200)) != []
        assert any(each.startswith("device is cuda (gfx950), needs gfx942") for each in said(strategy, replace(site, device=MI355)))  # fmt: skip


def test_gfx950_takes_in_one_stage_what_gfx942_does_not():
    for strategy in PLAIN:
        if kernel_of(strategy).quantization == "token_fp8":
            assert said(strategy, hidden(site_of(strategy), 2880)) == []


@pytest.mark.parametrize(
    ("ranks", "width", "fits"), [(8, 1032, False), (4, 1056, True), (8, 1088, True), (2, 1040, True)]
)
def test_rows_of_two_stages_are_shared_evenly(ranks, width, fits):
    """What is left over of a row by division stays unwritten."""
    for strategy in PLAIN:
        if kernel_of(strategy).norms and not kernel_of(strategy).quantization:
            site = older(hidden(replace(site_of(strategy), world_size=ranks), width))
            assert (said(strategy, site) == []) == fits


def test_a_hidden_size_known_only_at_run_time_is_refused():
    for strategy in STRATEGIES:
        env, x = symbolic(4, 512, which=1)
        words = said(strategy, replace(site_of(strategy), inputs={**site_of(strategy).inputs, "x": x}))
        if kernel_of(strategy).norms:
            assert any("known only at run time, needs a fixed hidden size; mark it static" in each for each in words)
        else:  # AITER's bare all_reduce has no rows
            assert any(
                "x.shape[-1] a multiple of 8 depends on a size that is known only at run time" in w for w in words
            )
        assert not env.guards
