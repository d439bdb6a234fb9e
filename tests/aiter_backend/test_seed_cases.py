"""The seed page's classes end to end: a model's graph, its site, this backend's strategy, the exact call of AITER.

https://docs.vllm.ai/en/latest/api/vllm/compilation/passes/fusion/allreduce_rms_fusion: its three AITER classes, the two
plain ones beside them and their Gemma forms, in vLLM's operators and in plain torch, over the model of AITER.

Transposed scales are fused where a model's graph says what they mean: in plain torch, and where vLLM's own quantiser
writes them. ``vllm::rocm_aiter_group_fp8_quant(transpose_scale=True)`` is refused by the dialect, since its bytes lie in
another order than its strides say (``fusion_core/lift/dialects/vllm.py``). MXFP4 is fused by hand alone: no operator and no
spelling in a graph reads as the scale that AITER's kernel writes.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.aiter_backend import seed_jobs as jobs
from tests.aiter_backend.seed_models import FP8

PLAIN, ADD = "all_reduce_rms_norm", "all_reduce_add_rms_norm"
QUANT, INDEXER, NO_ADD = (
    "AiterAllreduceFusedAddRMSNormGroupQuantFP8Pattern",
    "AiterAllreduceFusedAddRMSNormGroupQuantWithIndexerPattern",
    "AiterAllreduceFusedRMSNormGroupQuantFP8Pattern",
)
GROUP = {"group_size": 128, "emit_bf16": False, "transpose_scale": False}
TOKEN = {"post_per_token_quant": True, "gemma_norm": False, "emit_bf16": False}

# class -> the kernel that runs it, its pattern's live outputs, and the keywords that are the method's own
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    QUANT: (f"{ADD}_group_fp8", "quantized scale residual_out", GROUP),
    INDEXER: (f"{ADD}_group_fp8_out", "quantized scale normed residual_out", GROUP | {"emit_bf16": True}),
    NO_ADD: (f"{PLAIN}_group_fp8", "quantized scale", GROUP),
    "AllReduceRMSNormPattern": (PLAIN, "normed reduced", {"gemma_norm": False}),
    "AllReduceFusedAddRMSNormPattern": (ADD, "normed residual_out", {"gemma_norm": False}),
    "AllReduceGemmaRMSNormPattern": (PLAIN, "normed reduced", {"gemma_norm": True}),
    "AllReduceFusedAddGemmaRMSNormPattern": (ADD, "normed residual_out", {"gemma_norm": True}),
}
ROWS = [
    pytest.param(
        (name, spelling, {"vllm": "aiter", "torch": "torch"}[spelling] if "Quant" in name else ""),
        marks=[] if spelling == "vllm" else [pytest.mark.nightly],  # `test_two_layers` has these kernels in plain torch
    )
    for name in CLASSES
    for spelling in ("vllm", "torch")
]
CHOSEN = {f"{ADD}_group_fp8_out": f"{ADD}_group_fp8"}
"""Kernel → pattern, where their names differ."""


@contextmanager
def workers(tmp_path_factory, count):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        with WorkerPool(count, timeout=300) as pool:
            yield pool


# gfx942 is the same code with the other FP8 dtype: what is refused there, `test_requirements.py` asks too
@pytest.fixture(scope="module", params=[pytest.param("gfx942", marks=pytest.mark.nightly), "gfx950"])
def box(request, tmp_path_factory):
    """An architecture, and two of its GPUs."""
    with workers(tmp_path_factory, 2) as pool:
        yield request.param, pool


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    with workers(tmp_path_factory, 4) as pool:
        yield pool


def tensor(*shape, dtype=torch.bfloat16, stride=None):
    stride = (*(shape[-1:] if len(shape) == 2 else ()), 1) if stride is None else stride
    contiguous = len(shape) == 1 or stride == (shape[-1], 1)
    return {"shape": shape, "dtype": dtype, "stride": stride, "is_contiguous": contiguous}


def call(arch: str, own: dict[str, Any], *, one_stage: bool, tokens: int = 6, hidden: int = 512) -> dict[str, Any]:
    """AITER's call with the keywords of one method, whole: every argument by name, and what it gives in its order."""
    rows = tensor(tokens, hidden)
    if "group_size" in own:
        method, scales = "fused_ar_rms_per_group_quant", (tokens, hidden // 128)
    else:
        method, scales = "fused_ar_rms", (tokens, 1)
    outputs = (rows, rows)  # the norm and the sum
    if "emit_bf16" in own:
        stride = (1, tokens) if own.get("transpose_scale") else None
        scale = tensor(*scales, dtype=torch.float32, stride=stride)
        outputs = (tensor(tokens, hidden, dtype=FP8[arch]), rows, scale, *((rows,) if own["emit_bf16"] else ()))
    given = {"inp": rows, "res_inp": rows, "w": tensor(hidden), "eps": 1e-6, "registered": False}
    kwargs = given | {"use_1stage": one_stage} | own
    return {"method": method, "args": (), "kwargs": kwargs, "outputs": outputs, "error": None}


def check(
    seen: jobs.Seen, kernel: str, live: str, expected: dict[str, Any], *, left: str = "", strategy: str = ""
) -> None:
    """One place, one operator and one call; nothing else but ``left``; every value near float64."""
    assert seen.sites == [(CHOSEN.get(kernel, kernel), f"aiter.{strategy or kernel}", frozenset(live.split()))]
    assert seen.ran == {f"fusion_aiter::{kernel}": 1} | ({left: 1} if left else {})
    assert seen.calls == [expected]
    (largest,) = seen.residuals
    assert (largest == 0) is (ADD not in kernel), "zeros stand for a residual that there is none of"
    assert max(seen.off.values()) < 1, seen.off


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row))
def test_a_class_becomes_one_call_of_aiter(box, row):
    arch, two = box
    kernel, live, own = CLASSES[row[0]]
    left = "vllm::rocm_unquantized_gemm" if row[:2] == (INDEXER, "vllm") else ""
    for seen in two.run(jobs.one, arch, *row):
        check(seen, kernel, live, call(arch, own, one_stage=arch == "gfx950"), left=left)


@pytest.mark.parametrize("name", [QUANT, INDEXER, NO_ADD])
def test_the_classes_other_quantiser(box, name):
    """vLLM's Triton quantiser goes up to 224 in float8_e4m3fnuz and AITER's kernel to 240: refused on gfx942."""
    arch, two = box
    kernel, live, own = CLASSES[name]
    gemm = {"vllm::rocm_unquantized_gemm": 1} if name == INDEXER else {}
    for seen in two.run(jobs.one, arch, name, "vllm", "triton"):
        if arch == "gfx950":
            check(seen, kernel, live, call(arch, own, one_stage=True), left="".join(gemm))
            continue
        assert f"aiter.{kernel}: fp8_max is 224.0, needs 240" in seen.reasons
        alone = PLAIN if name == NO_ADD else ADD
        assert [site[:2] for site in seen.sites] == [(alone, f"aiter.{alone}")]
        assert seen.ran == {f"fusion_aiter::{alone}": 1, "vllm::triton_per_token_group_quant_fp8": 1} | gemm
        assert seen.calls == [call(arch, {"gemma_norm": False}, one_stage=False)]
        assert max(seen.off.values()) < 1


@pytest.mark.parametrize("box", ["gfx950"], indirect=True)  # Inductor's C++ for CPUs is slow to compile
@pytest.mark.parametrize(
    ("name", "spelling", "quantiser"),
    [(INDEXER, "vllm", "aiter"), pytest.param(QUANT, "torch", "torch transposed", marks=pytest.mark.nightly)],
)
def test_by_the_public_door(box, name, spelling, quantiser):
    """`fusion_core.compile`, Inductor's code generation included."""
    arch, two = box
    kernel, live, own = CLASSES[name]
    own = own | {"transpose_scale": "transposed" in quantiser}
    left = "vllm::rocm_unquantized_gemm" if name == INDEXER else ""
    for seen in two.run(jobs.one, arch, name, spelling, quantiser, public=True):
        check(seen, kernel, live, call(arch, own, one_stage=True), left=left)


@pytest.mark.parametrize(("spelling", "quantiser"), [("torch", "torch transposed"), ("vllm", "cuda transposed")])
def test_scales_that_a_model_wants_transposed(box, spelling, quantiser):
    arch, two = box
    kernel, live, own = CLASSES[QUANT]
    expected = call(arch, own | {"transpose_scale": True}, one_stage=arch == "gfx950")
    for seen in two.run(jobs.one, arch, QUANT, spelling, quantiser):
        check(seen, kernel, live, expected)


@pytest.mark.parametrize("quantiser", ["torch token", "aiter token"])
def test_one_scale_for_each_token(box, quantiser):
    arch, two = box
    expected = call(arch, TOKEN, one_stage=arch == "gfx950")
    for seen in two.run(jobs.one, arch, QUANT, quantiser.replace("aiter token", "vllm").partition(" ")[0], quantiser):
        check(seen, f"{ADD}_token_fp8", "quantized scale residual_out", expected)


@pytest.mark.parametrize(("pattern", "emits"), [(f"{ADD}_mxfp4", True), (f"{PLAIN}_mxfp4", False)])
def test_mxfp4_by_hand(box, pattern, emits):
    arch, two = box
    outputs = ("quantized", "scale", *(("normed",) if emits else ()))
    rows, codes, scales = tensor(6, 512), tensor(6, 256, dtype=torch.uint8), tensor(6, 16, dtype=torch.uint8)
    expected = call(arch, {"emit_bf16": emits}, one_stage=arch == "gfx950")
    expected |= {"method": "fused_ar_rms_mxfp4_quant", "outputs": (codes, rows, scales, *((rows,) if emits else ()))}
    for seen in two.run(jobs.by_hand, arch, pattern, outputs):
        assert seen.ran == {f"fusion_aiter::{pattern}{'_out' if emits else ''}": 1}
        assert seen.calls == [expected]
        assert (seen.residuals == [0]) is (pattern == f"{PLAIN}_mxfp4")
        assert max(seen.off.values()) < 1


@pytest.mark.parametrize(
    ("name", "spelling", "quantiser", "why", "gemma", "left"),
    [
        (QUANT, "vllm", "aiter transposed", "_group_fp8: transpose_scale of vllm::rocm_aiter_group_fp8_quant is True, needs False", False, "vllm::rocm_aiter_group_fp8_quant"),
        pytest.param(QUANT, "torch", "torch to 224", "_group_fp8: fp8_max is 224.0, needs {largest}", False, "", marks=pytest.mark.nightly),
        (QUANT, "torch", "torch to 224 in the other format", "_group_fp8: fp8_dtype is {other}, needs {native}", False, ""),
        pytest.param("Gemma with group quantisation", "vllm", "aiter", "_group_fp8: weight_bias is 1.0, needs 0.0", True, "vllm::rocm_aiter_group_fp8_quant", marks=pytest.mark.nightly),
        (QUANT, "vllm", "flashinfer mxfp4", "_mxfp4: scale_rounding is up, needs even", False, "flashinfer::fp4_quantize"),
        pytest.param(QUANT, "torch", "torch mxfp4", "_mxfp4: nothing in this graph reads as quantize_mxfp4", False, "", marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_a_quantisation_that_no_kernel_has_is_left_behind_the_fused_norm(
    box, name, spelling, quantiser, why, gemma, left
):
    arch, two = box
    native, other = (str(dtype).removeprefix("torch.") for dtype in sorted(FP8.values(), key=lambda d: d != FP8[arch]))
    why = why.format(largest="240" if arch == "gfx942" else "448", native=native, other=other)
    for seen in two.run(jobs.one, arch, name, spelling, quantiser):
        assert f"aiter.{ADD}{why}" in seen.reasons
        expected = call(arch, {"gemma_norm": gemma}, one_stage=arch == "gfx950")
        check(seen, ADD, "normed residual_out", expected, left=left)


def test_of_any_number_of_tokens_it_is_chosen_when_it_runs(box):
    arch, two = box
    kernel, live, own = CLASSES[QUANT]
    for seen in two.run(jobs.one, arch, QUANT, "vllm", "aiter", dynamic=True, max_tokens=6):
        check(seen, kernel, live, call(arch, own, one_stage=arch == "gfx950"))
    for seen in two.run(jobs.one, arch, QUANT, "vllm", "aiter", (7, 512), dynamic=True, max_tokens=6):
        assert seen.sites == [(kernel, f"aiter.{kernel}", frozenset(live.split()))], "the same graph"
        assert seen.calls == []
        assert not [name for name in seen.ran if "aiter" in name], seen.ran
        assert seen.ran["_c10d_functional::all_reduce_"] == 1
        assert max(seen.off.values()) < 1, seen.off


def test_leading_dimensions_are_one_for_aiter(box):
    arch, two = box
    kernel, live, own = CLASSES[INDEXER]
    for seen in two.run(jobs.one, arch, INDEXER, "torch", "torch", (2, 3, 512)):
        check(seen, kernel, live, call(arch, own, one_stage=arch == "gfx950"))


def test_rows_that_only_two_stages_take(box):
    """32 KiB to a row: a pack to each thread of a block is no longer enough."""
    arch, two = box
    kernel, live, own = CLASSES["AllReduceFusedAddRMSNormPattern"]
    expected = call(arch, own, one_stage=False, tokens=2, hidden=16384)
    for seen in two.run(jobs.one, arch, "AllReduceFusedAddRMSNormPattern", "vllm", "", (2, 16384)):
        check(seen, kernel, live, expected)


def test_one_stage_on_gfx942_where_the_user_asks_for_it(box):
    arch, two = box
    kernel, live, own = CLASSES[INDEXER]
    strategy = f"{kernel}_one_stage" if arch == "gfx942" else kernel
    for seen in two.run(jobs.one, arch, INDEXER, "torch", "torch", options=("aiter.one_stage",)):
        check(seen, kernel, live, call(arch, own, one_stage=True), strategy=strategy)


@pytest.mark.parametrize(("tokens", "one_stage"), [(255, True), (256, False)])
def test_four_ranks_take_one_stage_below_256_kib(four, tokens, one_stage):
    kernel, live, own = CLASSES[INDEXER]
    expected = call("gfx950", own, one_stage=one_stage, tokens=tokens)
    for seen in four.run(jobs.one, "gfx950", INDEXER, "vllm", "triton", (tokens, 512)):
        check(seen, kernel, live, expected, left="vllm::rocm_unquantized_gemm")


BLOCK = [
    (PLAIN, "normed reduced", {"gemma_norm": False}),
    (f"{ADD}_group_fp8", "quantized scale residual_out", GROUP),
    (f"{ADD}_group_fp8_out", "quantized scale normed residual_out", GROUP | {"emit_bf16": True}),
    (f"{ADD}_group_fp8", "quantized scale residual_out", GROUP),
    (ADD, "normed", {"gemma_norm": False}),
]


@pytest.mark.parametrize(("spelling", "quantiser"), [("vllm", "aiter"), ("torch", "torch")], ids=["vllm", "torch"])
def test_two_layers_become_five_calls_in_their_order(box, spelling, quantiser):
    block(*box, spelling, quantiser)


@pytest.mark.nightly  # `test_by_the_public_door` has one layer
@pytest.mark.parametrize("box", ["gfx950"], indirect=True)
def test_two_layers_by_the_public_door(box):
    block(*box, "vllm", "triton", public=True)


def block(arch, two, spelling, quantiser, public=False):
    for seen in two.run(jobs.block, arch, spelling, quantiser, public):
        assert seen.sites == [(CHOSEN.get(k, k), f"aiter.{k}", frozenset(live.split())) for k, live, _ in BLOCK]
        assert seen.calls == [call(arch, own, one_stage=arch == "gfx950") for _, _, own in BLOCK]
        kernels = [f"fusion_aiter::{kernel}" for kernel, _, _ in BLOCK]
        gemm = {"vllm::rocm_unquantized_gemm": 1} if spelling == "vllm" else {}
        assert seen.ran == {kernel: kernels.count(kernel) for kernel in kernels} | gemm
        assert [largest == 0 for largest in seen.residuals] == [True, False, False, False, False]
        assert seen.off["fused"] < 1.2 * seen.off["plain"] + 0.01
