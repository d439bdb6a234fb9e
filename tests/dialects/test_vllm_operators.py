"""Each of vLLM's operators behind its all_reduce, functional and through both of torch's wrappers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_core import Registry
from fusion_core.lift.dialects.vllm import DIALECT
from tests.dialects.agreement import assert_agree, assert_as_exact
from tests.dialects.vllm_cases import ADD, CASES, EPS, FUNCTIONAL, TOKENS, Case, given, group_fp8, ir, reduce, vllm
from tests.dialects.vllm_groups import vllm_groups
from tests.support.graphs import fuse

pytestmark = pytest.mark.usefixtures("vllm")

THROUGH = {"auto_functionalized": False, "auto_functionalized_v2": True}


def check(case: Case, own: Registry, tokens: int = TOKENS) -> None:
    tensors = given(tokens)
    fused = fuse(case.model, *tensors, using=own)
    site = fused.site
    assert (site.pattern, site.strategy) == (case.pattern, f"own.{case.pattern}")
    assert set(site.attributes["live"]) == set(case.live.split())
    assert site.attributes["collective"] == case.collective
    if "eps" in site.attributes:
        expected = {"eps": EPS, "weight_bias": 0.0, "norm_dtype": None, **case.differing}
        assert {key: site.attributes[key] for key in expected} == expected
    theirs = ("vllm.", "vllm_ir.", "_C.", "auto_functionalized", "aten.empty")  # none is left, nor a buffer for one
    assert not [target for target in fused.targets() if any(name in str(target) for name in theirs)]
    plain = case.model(*tensors)
    assert_agree(fused.results, plain)
    if "normed" in site.attributes["live"]:
        results, unfused = (r if isinstance(r, tuple) else (r,) for r in (fused.results, plain))
        at = next(index for index, result in enumerate(results) if result.dtype == torch.bfloat16)
        assert_as_exact(results[at], unfused[at], oracle(site, tensors))


def oracle(site: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    """The norm in float64."""
    x, r, w = (t.double() for t in tensors[:3])
    total = x + r if "residual" in site.attributes["inputs"] else x
    result = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    return result * (w + site.attributes["weight_bias"]) if "weight" in site.attributes["inputs"] else result


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_a_functional_operator_is_fused(name: str, own: Registry) -> None:
    check(FUNCTIONAL[name], own)


@pytest.mark.parametrize("wrapper", THROUGH)
@pytest.mark.parametrize("name", CASES)
def test_an_operator_that_writes_into_its_arguments_is_fused(name: str, wrapper: str, own: Registry) -> None:
    with torch._inductor.config.patch(enable_auto_functionalized_v2=THROUGH[wrapper]):
        model = CASES[name].model
        before = [row for row in fuse(model, *given(), using=own).before[0] if row[0] == "call_function"]
        assert [row for row in before if row[2] is getattr(torch.ops.higher_order, wrapper)]
        check(CASES[name], own)


def test_every_operator_of_the_dialect_has_a_case() -> None:
    tested = {name.partition(" ")[0] for name in (*CASES, *FUNCTIONAL)}
    assert set(DIALECT.readings) == tested | {"_C::dynamic_scaled_fp8_quant"}


def test_a_token_count_known_only_at_run_time_does_not_hide_the_layout_of_scales(own: Registry) -> None:
    x, r, w, s, g = given()
    for tensor in (x, r):
        torch._dynamo.mark_dynamic(tensor, 0)
    for column_major in (False, True):
        model = group_fp8(column_major, False)
        fused = fuse(model, x, r, w, s, g, using=own)
        assert fused.site.strategy == f"own.{ADD}_group_fp8"
        assert fused.site.attributes["scale_layout"] == ("column_major" if column_major else "row_major")
        assert_agree(fused.results, model(x, r, w, s, g))


def test_scales_of_one_token_are_read_whatever_their_strides(own: Registry) -> None:
    for name in ("_C::per_token_group_fp8_quant column-major", "_C::rms_norm_per_block_quant"):
        fused = fuse(CASES[name].model, *given(1), using=own)
        assert fused.site.strategy == f"own.{CASES[name].pattern}"


def test_a_gemm_of_the_norm_is_a_user_like_any_other(own: Registry) -> None:
    def model(x, r, w, s, g):
        norm, total = ir.fused_add_rms_norm(reduce(x), r, w, EPS)
        return vllm.rocm_unquantized_gemm(norm, r), *vllm.triton_per_token_group_quant_fp8(norm, 128), total

    tensors = given()
    fused = fuse(model, *tensors, using=own)
    assert fused.site.strategy == f"own.{ADD}_group_fp8"
    assert set(fused.site.attributes["live"]) == {"quantized", "scale", "normed", "residual_out"}
    assert torch.ops.vllm.rocm_unquantized_gemm.default in fused.targets()
    gemm, plain = fused.results[0], model(*tensors)[0]
    torch.testing.assert_close(gemm, plain, rtol=0.02, atol=0.2)


def test_a_name_of_vllm_stands_for_the_group_that_vllm_says(own: Registry) -> None:
    other = torch.distributed.new_group([0])
    with vllm_groups(tp_0=other):
        site = fuse(CASES["_C::rms_norm"].model, *given(), using=own).site
    assert site.strategy == "own.all_reduce_rms_norm"
    assert site.attributes["group"] == other.group_name != torch.distributed.group.WORLD.group_name
