"""From torch.compile to FlashInfer's call and back, with a stand-in for the GPU's kernels alone."""

from dataclasses import replace

import pytest

from fusion_core.workers import WorkerPool
from fusion_flashinfer.kernels import KERNELS
from tests.flashinfer_backend import graphs

SOON = (
    "all_reduce",
    "all_reduce_add_rms_norm",
    "all_reduce_rms_norm_static_fp8_out",
    "all_reduce_add_rms_norm_group_fp8",
)
"""One kernel of each kind; `test_workspaces.py` calls every one, and the corpus recognises every pattern."""
ON_AN_H100 = [
    pytest.param(kernel.name, marks=[] if kernel.name in SOON else [pytest.mark.nightly])
    for kernel in KERNELS
    if kernel.quantization != "nvfp4"
]
MODEL = ["flashinfer.all_reduce_rms_norm", "flashinfer.all_reduce_add_rms_norm", "flashinfer.all_reduce_add_rms_norm"]
NEAR = 2e-5
"""Of float32 results of size 4 to float64."""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        with WorkerPool(2, timeout=300) as pool:
            yield pool


@pytest.mark.parametrize("name", ON_AN_H100)
@pytest.mark.parametrize("form", ["", pytest.param("_two_shot", marks=pytest.mark.nightly)])  # PDL's run both
def test_a_site_of_every_pattern_is_fused_by_its_kernel(two, name, form):
    """With `_out`, the norm and its quantisation are live, as where an indexer reads the one and experts the other."""
    for strategies, calls, distance in two.run(graphs.one, name, two_shot=bool(form)):
        assert strategies == [f"flashinfer.{name}{form}"]
        assert calls == [(not form, False)]
        assert distance <= 1


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param("all_reduce", "_two_shot", marks=pytest.mark.nightly),  # the last row has this form
        ("all_reduce_add_rms_norm", ""),
        pytest.param("all_reduce", "", marks=pytest.mark.nightly),
        pytest.param("all_reduce_add_rms_norm", "_two_shot", marks=pytest.mark.nightly),
        pytest.param("all_reduce_rms_norm_static_fp8_out", "", marks=pytest.mark.nightly),
        ("all_reduce_rms_norm_static_fp8_out", "_two_shot"),
    ],
)
def test_with_the_option_pdl_kernels_are_launched_with_it(two, name, form):
    config = replace(graphs.CONFIG, options=("flashinfer.pdl",))
    for strategies, calls, distance in two.run(graphs.one, name, config, bool(form)):
        assert strategies == [f"flashinfer.{name}{form}_pdl"]
        assert calls == [(not form, True)]
        assert distance <= 1


def test_a_model_is_fused_all_through(two):
    for strategies, calls, distance in two.run(graphs.model):
        assert strategies == MODEL
        assert calls == [1, 1, 1]
        assert distance < NEAR


def test_one_graph_for_any_number_of_tokens_chooses_when_it_runs(two):
    one_shot = {40: None, 8: True, 3: True, 9: False, 16: False, 17: None, 2: True, 64: None}
    expected = [[] if form is None else [(tokens, form)] * 3 for tokens, form in one_shot.items()]
    for strategies, ran, distance, compiled in two.run(graphs.crossing, list(one_shot), one_shot=8, most=16):
        assert strategies == MODEL
        assert ran == expected
        assert distance < NEAR
        assert compiled == 1


@pytest.mark.parametrize("two_shot", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_one_form_alone_takes_any_number_of_tokens(two, two_shot):
    """In parts where one launch does not take all; two-shot only where there are more of them than ranks."""
    parts = {2: [] if two_shot else [2], 3: [3], 16: [16], 17: [9, 8], 2 * 16 + 1: [11, 11, 11]}
    expected = [[(part, not two_shot) for part in each] * 3 for each in parts.values()]
    for strategies, ran, distance, compiled in two.run(graphs.forced, list(parts), most=16, two_shot=two_shot):
        assert strategies == [f"{name}_two_shot" if two_shot else name for name in MODEL]
        assert ran == expected
        assert distance < NEAR
        assert compiled == 1


def test_a_fixed_size_above_the_limit_is_left_unfused(two):
    for strategies, report in two.run(graphs.refused, 1025, 1024):
        assert strategies == [None]
        assert "x has 1 MiB on 2 ranks of cuda (sm_90), needs over 0 up to 1 MiB, as said; fusion-core tune" in report


def test_max_tokens_reaches_the_operator(two):
    for fused, elements, distance in two.run(graphs.capacity, 24, [24, 25, 7]):
        assert fused == [True, False, True]
        assert elements == 24 * graphs.HIDDEN
        assert distance < NEAR


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_the_report_says_what_became_of_a_workspace(two, rank):
    for report, state, distance in two.run(graphs.failing, rank):
        assert distance < NEAR, "the model got the unfused answer"
        reason = f"rank {rank}: making a workspace raised RuntimeError: cuMemCreate: out of memory"
        assert state.startswith(reason)
        _, _, at_run_time = report.partition("at run time:\n")
        assert f"flashinfer.all_reduce_rms_norm runs unfused: {reason}" in at_run_time


def test_a_graph_from_the_compile_cache_makes_its_workspace_when_it_first_runs(tmp_path, monkeypatch):
    """The pass does not run then; a workspace that it had made would be missing (vLLM#37468)."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        with WorkerPool(2, timeout=300) as pool:
            found.append(pool.run(graphs.started))
    assert "compiled" in [origin for origin, *_ in found[0]], "one rank may find what the other has just cached"
    assert all(hits > 0 for _, _, hits, _, _ in found[1])
    for origin, strategies, _, workspaces, distance in found[1]:
        assert origin == "cache"
        assert strategies == MODEL
        assert workspaces == 1
        assert distance < NEAR
