"""Calls of vLLM's operators that mean something else: each is left alone, with the reason."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_core import FusionPass, Registry, SiteReport, Stage
from tests.dialects.vllm_cases import (
    ADD,
    EPS,
    PLAIN,
    N,
    c,
    codes_like,
    given,
    group_buffers,
    ir,
    normed,
    reduce,
    vllm,
)
from tests.dialects.vllm_groups import vllm_groups
from tests.dialects.vllm_operators import FP8
from tests.support.graphs import REFERENCE, describe, fuse, registry

pytestmark = pytest.mark.usefixtures("vllm")


def part_of_the_variance(x, r, w, s, g):
    return ir.fused_add_rms_norm(reduce(x), r, w, EPS, 64)


def part_of_the_variance_plain(x, r, w, s, g):
    return ir.rms_norm(reduce(x), w, EPS, 64)


def upper_bound(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out, scale = codes_like(norm), norm.new_empty((norm.shape[0], 1), dtype=torch.float32)
    c.dynamic_per_token_scaled_fp8_quant(out, norm, scale, s)
    return out, scale


def upper_bound_in_the_norm(x, r, w, s, g):
    a = reduce(x)
    out, scale = codes_like(a), a.new_empty((a.shape[0], 1), dtype=torch.float32)
    c.rms_norm_dynamic_per_token_quant(out, a, w, scale, EPS, s, None)
    return out, scale


def one_dynamic_scale(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out, scale = codes_like(norm), norm.new_empty((1,), dtype=torch.float32)
    c.dynamic_scaled_fp8_quant(out, norm, scale)
    return out, scale


def scale_of_each_column(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out = codes_like(norm)
    c.static_scaled_fp8_quant(out, norm, s.expand(N) * 1, (-1, 1))
    return out


def groups_of_a_static_scale(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out = codes_like(norm)
    c.static_scaled_fp8_quant(out, norm, s, (1, 128))
    return out


def int8(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out, scale = group_buffers(norm, False)
    out = torch.empty_like(norm, dtype=torch.int8)
    c.per_token_group_fp8_quant(norm, out, scale, 128, 1e-10, -127.0, 127.0, False, False, False)
    return out, scale


def lopsided(x, r, w, s, g):
    norm = normed(reduce(x), w)
    out, scale = group_buffers(norm, False)
    c.per_token_group_fp8_quant(norm, out, scale, 128, 1e-10, 0.0, 448.0, False, False, False)
    return out, scale


def aligned_scales(x, r, w, s, g):
    norm = normed(reduce(x), w)
    tokens = norm.shape[0]
    out, scale = codes_like(norm), torch.empty_strided((tokens, N // 128), (1, (tokens + 3) // 4 * 4))
    c.per_token_group_fp8_quant(norm, out, scale, 128, 1e-10, -448.0, 448.0, False, True, True)
    return out, scale


def scales_that_do_not_lie_as_they_are_written(x, r, w, s, g):
    a = reduce(x)
    out, scale = group_buffers(a, True)
    c.rms_norm_per_block_quant(out, a, w, scale, EPS, None, None, 128, False)
    return out, scale


def transposed_aiter_scales(x, r, w, s, g):
    return vllm.rocm_aiter_group_fp8_quant(normed(reduce(x), w), 128, True)


def aiter_groups_of_64(x, r, w, s, g):
    return vllm.rocm_aiter_group_fp8_quant(normed(reduce(x), w), 64)


def given_aiter_scale(x, r, w, s, g):
    return vllm.rocm_aiter_per_token_quant(normed(reduce(x), w), FP8, s)


def weight_of_each_row(x, r, w, s, g):
    return ir.rms_norm(reduce(x), w.expand(x.shape) * 1, EPS)


def global_scale_of_each_token(x, r, w, s, g):
    return c.scaled_fp4_quant(normed(reduce(x), w), g.expand(x.shape[0]).reshape(-1, 1, 1) * 1, False)


def into_a_part_of_a_buffer(x, r, w, s, g):
    norm = normed(reduce(x), w)
    buffer = norm.new_empty((2, *norm.shape)).to(FP8)
    c.static_scaled_fp8_quant(buffer[1], norm, s)
    return buffer


def residual_in_a_part_of_a_buffer(x, r, w, s, g):
    a, both = reduce(x), torch.cat([r, r], dim=1).view(2, *r.shape) * 1
    c.fused_add_rms_norm(a, both[0], w, EPS)
    return a, both


def one_buffer_twice(x, r, w, s, g):
    a = reduce(x)
    c.fused_add_rms_norm(a, a, w, EPS)
    return a


# name -> (model, code, what the reason says, the pattern that stands instead)
REFUSALS: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "variance_size": (part_of_the_variance, "variance_size", "is 64, needs None", "all_reduce"),
    "variance_size without residual": (part_of_the_variance_plain, "variance_size", "is 64, needs None", "all_reduce"),
    "scale_ub": (upper_bound, "scale_ub", "is a tensor, float32[1], needs None", PLAIN),
    "scale_ub of a fused norm": (upper_bound_in_the_norm, "scale_ub", "needs None", "all_reduce"),
    "a dynamic scale for the whole tensor": (one_dynamic_scale, "per_tensor", "one scale for the whole tensor", PLAIN),
    "a static scale per column": (scale_of_each_column, "scale", f"float32[{N}], needs one float32", PLAIN),
    "group_shape": (groups_of_a_static_scale, "group_shape", "is (1, 128), needs None or (-1, -1)", PLAIN),
    "int8": (int8, "dtype", "quantises to int8, needs float8_e4m3fn", PLAIN),
    "bounds that are not symmetric": (lopsided, "fp8_min", "between 0.0 and 448.0", PLAIN),
    "scales padded for TMA": (aligned_scales, "scale_layout", "needs (tokens, groups) in strides", PLAIN),
    "strides and flag at odds": (
        scales_that_do_not_lie_as_they_are_written, "scale_layout", "written row_major", "all_reduce",
    ),
    "AITER's transposed scales": (transposed_aiter_scales, "transpose_scale", "is True, needs False", PLAIN),
    "AITER's groups of 64": (aiter_groups_of_64, "group_size", "is 64, needs 128", PLAIN),
    "a scale given to AITER": (given_aiter_scale, "scale", "is a tensor, float32[1], needs None", PLAIN),
    "a weight per row": (weight_of_each_row, "weight", "needs one dimension", "all_reduce"),
    "a global FP4 scale per token": (global_scale_of_each_token, "scale", "needs one float32", PLAIN),
}  # fmt: skip
VIEWS = {
    "part of a buffer": (into_a_part_of_a_buffer, "view", "result of _C::static_scaled_fp8_quant is a view of", PLAIN),
    "a residual in a buffer": (
        residual_in_a_part_of_a_buffer, "view", "residual of _C::fused_add_rms_norm is a view of", "all_reduce",
    ),
    "one buffer twice": (one_buffer_twice, "view", "with another written argument", "all_reduce"),
}  # fmt: skip


def check(model: Callable[..., Any], code: str, why: str, stands: str, own: Registry) -> None:
    fused = fuse(model, *given(), using=own)
    assert fused.site.pattern == stands
    assert fused.site.strategy != "own.all_reduce" or stands == "all_reduce"
    found = reasons(fused.site)
    assert [text for known, text in found if known == code and why in text], found


def reasons(site: SiteReport) -> set[tuple[str, str]]:
    refused = [decision for decision in site.decisions if decision.stage is Stage.STRUCTURE]
    return {(reason.code, str(reason)) for decision in refused for reason in decision.reasons}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_call_that_means_something_else_is_left_alone(name: str, own: Registry) -> None:
    check(*REFUSALS[name], own)


@pytest.mark.parametrize("name", VIEWS)
def test_an_argument_that_is_a_part_of_a_buffer_is_left_alone(name: str, own: Registry) -> None:
    check(*VIEWS[name], own)


def test_a_buffer_of_its_own_for_each_view_is_told_by_the_wrapper_that_copies_arguments(own: Registry) -> None:
    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        fused = fuse(into_a_part_of_a_buffer, *given(), using=own)
    assert fused.site.strategy == f"own.{PLAIN}_static_fp8"


def of_a_group_that_no_call_can_reach(name: str, own: Registry) -> SiteReport:
    """The report of a graph whose all_reduce would raise if it ran."""
    x, w = given()[:3:2]
    traced = make_fx(lambda x, w: normed(vllm.all_reduce(x, name), w), tracing_mode="fake")(x, w)
    before = describe(traced.graph)
    (site,) = FusionPass(registry=own).run(traced.graph).sites
    assert site.strategy is None
    assert describe(traced.graph) == before
    return site


def test_a_group_that_vllm_does_not_know_is_left_alone(own: Registry) -> None:
    found = "the process group is vLLM's 'tp:9', which this process does not know, needs one of tp:0"
    assert reasons(of_a_group_that_no_call_can_reach("tp:9", own)) == {("group", found)}


def test_a_group_that_is_gone_is_unknown(own: Registry) -> None:
    with vllm_groups(tp_0=torch.distributed.group.WORLD) as coordinators:
        coordinators.clear()
        site = of_a_group_that_no_call_can_reach("tp:0", own)
    found = (
        "the process group is vLLM's 'tp:0', which this process does not know, "
        "needs a group in vllm.distributed.parallel_state, which has none"
    )
    assert reasons(site) == {("group", found)}


def test_the_reference_backend_leaves_another_frameworks_collective_alone() -> None:
    fused = fuse(lambda x, w: normed(reduce(x), w), *given()[:3:2], using=registry(REFERENCE))
    assert fused.site.strategy is None
    assert fused.before == fused.after
    late = next(d for d in fused.site.decisions if d.strategy == f"reference.{PLAIN}")
    assert (late.stage, late.reasons[0].code) == (Stage.WORTHWHILE, "collective")
    assert str(late.reasons[0]) == (
        "the place calls vllm::all_reduce, which may be faster than torch's all_reduce, "
        "needs a backend with a kernel of its own"
    )


def test_the_cache_key_tells_which_group_a_name_of_vllm_stands_for(own: Registry) -> None:
    own_pass = FusionPass(registry=own)
    key = own_pass.uuid()
    with vllm_groups(tp_0=SimpleNamespace(group_name="7", size=lambda: 2)):
        assert own_pass.uuid() != key
    assert own_pass.uuid() == key


def test_the_cache_key_is_the_same_where_groups_of_one_rank_have_other_names(own: Registry) -> None:
    own_pass = FusionPass(registry=own)
    key = own_pass.uuid()
    with vllm_groups(dp_0=torch.distributed.new_group([0])):
        assert own_pass.uuid() == key


def test_no_reading_of_a_call_is_a_problem(own: Registry, recwarn: Any) -> None:
    tensors: tuple[Tensor, ...] = given()
    fuse(part_of_the_variance, *tensors, using=own)
    assert not [warning for warning in recwarn if "dialect" in str(warning.message)]
    assert ADD in {d.pattern for d in fuse(part_of_the_variance, *tensors, using=own).site.decisions}
