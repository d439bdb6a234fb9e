"""What FlashInfer's strategies refuse, by the reasons' words; no GPU and no FlashInfer is needed."""

from dataclasses import replace

import pytest
import torch

from fusion_flashinfer import strategies
from fusion_flashinfer.kernels import KERNELS
from fusion_flashinfer.limits import MOST
from tests.flashinfer_backend.sites import (
    BF16,
    FP16,
    FP32,
    FP64,
    H100,
    PLAIN,
    expanded,
    given,
    kernel_of,
    live,
    said,
    site_of,
    sized,
    typed,
    untouched,
)
from tests.support.symbols import symbolic

pytestmark = pytest.mark.usefixtures("nothing_is_imported")


def everywhere(kernel):
    return True


def norms(kernel):
    return kernel.norms


def quantises(kernel):
    return bool(kernel.quantization)


def fp8(kernel):
    return kernel.quantization.endswith("fp8")


def only(quantization):
    return lambda kernel: kernel.quantization == quantization


def adds(kernel):
    return kernel.adds


def gives_norm(kernel):
    return quantises(kernel) and kernel.norm_out


def gives_no_norm(kernel):
    return quantises(kernel) and not kernel.norm_out


HALF = "bfloat16 or float16"
REFUSED = [
    (lambda k: not k.in_parts, lambda s: sized(s, MOST // 512 + 128, 256), "x has 64.06 MiB, needs at most 64 MiB",
     "scales with a layout of the whole"),
    (lambda k: not k.in_parts, lambda s: sized(s, 2 * MOST // 512, 256), "x has 128 MiB, needs at most 64 MiB", ""),
    (everywhere, lambda s: typed(s, FP64), "x is float64, needs bfloat16", "T6: the kernels know three dtypes"),
    (quantises, lambda s: typed(s, FP32), f"x is float32, needs {HALF}", "no FP8 or FP4 kernel takes float32"),
    (norms, lambda s: typed(s, FP32, "weight"), "weight is float32, needs bfloat16, the dtype of x", "T4"),
    (norms, lambda s: typed(s, FP16, "weight"), "weight is float16, needs bfloat16, the dtype of x", "T4"),
    (adds, lambda s: typed(s, FP32, "residual"), "residual is float32, needs bfloat16, the dtype of x", "T4"),
    (lambda k: not quantises(k), lambda s: sized(s, 4, 20), "x.shape[-1] is 20, needs a multiple of 8", "16 bytes"),
    (everywhere, lambda s: sized(s, 4, 128 * 1025),
     "x.shape[-1] is 131200, which takes 2050 threads to a block, needs at most 1024", "T6"),
    (lambda k: k.quantization in ("", "static_fp8", "token_fp8"), lambda s: sized(s, 4, 8200),
     "x.shape[-1] is 8200, which takes 1025 threads to a block, needs at most 1024", "T6"),
    (lambda k: k.quantization != "group_fp8", lambda s: sized(s, 4, 16400),
     "x.shape[-1] is 16400, which takes 1025 threads to a block, needs at most 1024", "T6"),
    (only("group_fp8"), lambda s: given(s, group_size=64), "group_size is 64, needs 128", "what the kernel has"),
    (only("group_fp8"), lambda s: given(s, scale_format="float32"), "scale_format is float32, needs ue8m0_packed", ""),
    (only("group_fp8"), lambda s: given(s, scale_format="ue8m0"), "scale_format is ue8m0, needs ue8m0_packed", ""),
    (only("group_fp8"), lambda s: given(s, scale_layout="column_major"),
     "scale_layout is column_major, needs row_major", ""),
    (only("group_fp8"), lambda s: given(s, min_scale=1e-4), "min_scale is 0.0001, needs None or 1e-10", ""),
    (only("token_fp8"), lambda s: given(s, min_scale=1e-12), "min_scale is 1e-12, needs None or", ""),
    (fp8, lambda s: given(s, fp8_dtype=torch.float8_e4m3fnuz), "fp8_dtype is float8_e4m3fnuz, needs float8_e4m3fn", ""),
    (fp8, lambda s: given(s, fp8_max=224.0), "fp8_max is 224.0, needs None or 448.0", ""),
    (only("static_fp8"), lambda s: untouched(s, "scale"), "scale is bfloat16, needs float32", ""),
    (only("nvfp4"), lambda s: untouched(s, "global_scale"), "global_scale is bfloat16, needs float32", ""),
    (adds, lambda s: given(s, residual_dtype=FP32), "residual_dtype is float32, needs bfloat16", ""),
    (lambda k: norms(k) and not quantises(k), lambda s: given(s, norm_dtype=FP32),
     "norm_dtype is float32, needs bfloat16", ""),
    (quantises, lambda s: given(s, norm_dtype=FP16), "norm_dtype is float16, needs bfloat16 or float32", ""),
    (gives_norm, lambda s: given(live(s, *s.outputs, "normed"), norm_dtype=FP32),
     "normed is float32, needs bfloat16, the dtype of x", "who reads the norm itself reads it as the model has it"),
    (gives_no_norm, lambda s: live(s, *s.outputs, "normed"), "normed is used outside the site, needs no other live", ""),
    (adds, lambda s: live(s, *s.outputs, "reduced"), "reduced is used outside the site, needs no other live outputs",
     "no pattern of FlashInfer gives the sum before the residual"),
    (norms, lambda s: replace(s, inputs={n: m for n, m in s.inputs.items() if n != "weight"}),
     "there is no weight, needs one", ""),
    (only("nvfp4"), lambda s: replace(s, device=H100), "device is cuda (sm_90), needs compute capability 10 or later",
     "B6: a silent no-op"),
    *((everywhere, lambda s, ranks=ranks: replace(s, world_size=ranks), f"world size is {ranks}, needs 2, 4 or 8", "T6")
      for ranks in (1, 3, 6, 16)),
]  # fmt: skip


@pytest.mark.parametrize(("applies", "change", "words", "why"), REFUSED, ids=[str(row[2]) for row in REFUSED])
def test_refused(applies, change, words, why):
    asked = [strategy for strategy in PLAIN if applies(kernel_of(strategy))]
    assert asked
    for strategy in asked:
        found = said(strategy, change(site_of(strategy)))
        assert any(each.startswith(words) for each in found), strategy.name


def test_more_than_one_launch_takes():
    assert {kernel.quantization for kernel in KERNELS if not kernel.in_parts} == {"group_fp8", "nvfp4"}
    for strategy in PLAIN:
        assert said(strategy, sized(site_of(strategy), MOST // 512, 256)) == []
        words = said(strategy, sized(site_of(strategy), 4 * MOST // 512, 256))
        assert words == ([] if kernel_of(strategy).in_parts else ["x has 256 MiB, needs at most 64 MiB"])


@pytest.mark.parametrize(("dtype", "ranks", "least"), [(BF16, 2, 16), (BF16, 8, 64), (FP32, 4, 16)])
def test_a_row_of_a_two_shot_kernel_has_a_vector_for_each_rank(dtype, ranks, least):
    """x of 3 x 8 on two ranks ended in FlashInfer's "not oneshot, or block_size < nranks"."""
    (strategy,) = [s for s in PLAIN if s.name == "flashinfer.all_reduce_two_shot"]
    site = replace(site_of(strategy), world_size=ranks)
    site = replace(site, inputs={"x": replace(site.inputs["x"], dtype=dtype)}, outputs={})
    assert said(strategy, sized(site, 9, least)) == []
    words = f"x.shape[-1] is {least - 8}, needs 16 bytes for each of the {ranks} ranks"
    assert said(strategy, sized(site, 9, least - 8)) == [words]


def test_nvfp4_rows_are_whole_blocks_of_16():
    (strategy,) = [s for s in PLAIN if s.name == "flashinfer.all_reduce_rms_norm_nvfp4"]
    site = site_of(strategy)
    odd = replace(site, inputs={**site.inputs, "x": replace(site.inputs["x"], shape=(4, 264), stride=(264, 1))})
    assert said(strategy, odd) == ["x.shape[-1] is 264, needs a multiple of 16"]


def test_a_hidden_size_known_only_at_run_time_is_refused():
    (strategy,) = [s for s in PLAIN if s.name == "flashinfer.all_reduce"]
    x = symbolic(4, 256, which=1)[1]
    site = replace(site_of(strategy), inputs={"x": x})
    assert any(
        "known only at run time, needs a fixed hidden size; mark it static" in each for each in said(strategy, site)
    )


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("NCCL_NVLS_ENABLE", "0", True),
        ("NCCL_NVLS_ENABLE", "1", False),
        ("NCCL_NVLS_ENABLE", "2", False),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1", True),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "true", True),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0", False),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "", False),
        ("NVSHMEM_DISABLE_NVLS", "1", True),
        ("NVSHMEM_DISABLE_NVLS", "0", False),
        ("UNRELATED", "1", False),
    ],
)
def test_where_multicast_is_switched_off_mnnvl_is_refused(monkeypatch, name, value, off):
    for each in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, value)
    declared = expanded(strategies._strategies())
    expected = [f"{name}={value} switches NVLink multicast off, needs it on"] if off else []
    for strategy in declared:
        site = site_of(next(s for s in PLAIN if s.name == f"flashinfer.{kernel_of(strategy).name}"))
        assert said(strategy, site) == (expected if strategy.option == "mnnvl" else [])
    assert (name in repr([s.requires for s in declared])) == off, "it is a part of the compile-cache key"
