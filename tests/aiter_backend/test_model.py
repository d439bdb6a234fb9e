"""The model of AITER: its interface against the release's, its life, and what it says to calls that do not fit."""

import ast
import inspect

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.aiter_backend import model_jobs as jobs
from tests.aiter_backend import releases

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def two():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with WorkerPool(4) as pool:
        yield pool


def definitions():
    tree = ast.parse((jobs.MODEL / "aiter" / releases.COMMUNICATOR).read_text(encoding="utf-8"))
    (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "CustomAllreduce")
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found |= {f"CustomAllreduce.{node.name}": node for node in owner.body if isinstance(node, ast.FunctionDef)}
    public = {name: node for name, node in found.items() if not name.startswith("CustomAllreduce._")}
    return public | {"CustomAllreduce.__init__": found["CustomAllreduce.__init__"]}


@pytest.mark.parametrize(("name", "node"), definitions().items(), ids=definitions())
def test_signatures_are_the_release_s(name, node):
    for argument in [*node.args.args, *node.args.kwonlyargs]:
        argument.annotation = None
    stub = {}
    exec(f"def f({ast.unparse(node.args)}): ...", stub)
    assert inspect.signature(stub["f"]) == releases.signature(name, "HEAD")


def test_the_workers_store_is_what_aiter_needs(two):
    for types in two.run(jobs.store_types):
        assert types[-1] == "TCPStore"


@pytest.mark.parametrize(
    ("arch", "answer"),
    [
        (None, "RuntimeError: Get GPU arch from rocminfo failed"),
        ("gfx1250", 'KeyError: "Unknown GPU architecture: gfx1250.'),
        ("gfx942", "aiter"),
    ],
)
def test_the_architecture_is_needed_and_known(two, arch, answer):
    for text in two.run(jobs.import_alone, arch):
        assert text.startswith(answer)


def test_a_communicator_until_it_is_closed(two):
    for rank, (*attributes, pointer, fits, answer) in enumerate(two.run(jobs.life)):
        assert attributes == [False, 2, rank, 1 << 20, True, True, "cuda:0", 1 << 20]
        assert (pointer, fits) == (0, True)
        assert answer.startswith("AssertionError: the communicator is closed")


def test_groups_that_the_constructor_does_not_take(two):
    for nccl, *stores in two.run(jobs.groups_refused):
        assert nccl.startswith("AssertionError: CustomAllreduce should be attached to a non-NCCL group")
        for store in stores:
            assert store.startswith("AssertionError: IPC metadata exchange requires")
            assert "got HashStore" in store


def test_world_sizes_that_disable_it(four):
    first, second, third, fourth = four.run(jobs.odd_sizes)
    assert first == [(True, False, None)] * 2
    assert second == third == [(True, False, None)]
    assert fourth == []


def test_ranks_that_made_different_numbers_of_communicators_never_meet(two):
    for first, caught_up in two.run(jobs.odd_counts):
        assert first.startswith("AssertionError: the kernels would wait for each other for ever in TCPStore.get")
        assert caught_up == "CustomAllreduce"


def test_all_ranks_must_make_the_same_call(two):
    rows, kernels, misaligned, group, mirror = zip(*two.run(jobs.disagree), strict=True)
    for text in (*rows, *kernels, misaligned[0], group[0]):
        assert text.startswith("AssertionError: the kernels would wait for each other for ever: rank 0: ('")
    assert "rank 1: refused: RuntimeError" in misaligned[0]
    assert misaligned[1].startswith("RuntimeError: misaligned address: weight")
    assert group[1].startswith("ValueError: per-group quant")
    assert mirror == (BF16, BF16), "no kernel waits for what only one rank stores"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_comes_alone_hears_of_it(rank):
    with WorkerPool(2) as pool:
        answers = pool.run(jobs.alone, rank)
    assert answers[rank].startswith("AssertionError: the kernels would wait for each other for ever")
    assert answers[1 - rank] == "elsewhere"


def test_zeros_while_a_capture_warms_up(two):
    _, results = two.run(jobs.warming_up, 1)
    assert [tuple(each.dtype for each in result) for result in results] == [
        (BF16,),
        (BF16, BF16),
        (torch.uint8, BF16, FP32, BF16),
        (torch.uint8, BF16, FP32),
        (torch.uint8, BF16, torch.uint8),
    ]
    assert results[3][2].stride() == (1, 2)
    assert not any(each.float().any() for result in results for each in result)


def test_an_address_that_nobody_exchanged(two):
    x = torch.ones(2, 512)
    for text in two.run(jobs.call, "gfx950", "fused_ar_rms", [x, x], x, w=x[0], eps=0.0, registered=True):
        assert "is not registered!" in text
    for results in two.run(jobs.captured, inside=False):
        assert all(each.isnan().all() for each in results)
    for out, residual in two.run(jobs.captured, inside=True):
        assert (out == 1).all()
        assert (residual == 3).all()


MIB64 = 64 << 20


@pytest.mark.parametrize(
    ("environment", "max_size", "sizes", "answers"),
    [
        ({}, 1 << 30, [0, 8, 16, MIB64, MIB64 + 16], [False, False, True, True, False]),
        ({}, 1 << 20, [2 << 20], [True]),  # the gate does not know the pool
        ({"AITER_CUSTOM_AR_MAX_SIZE": "0"}, 1 << 30, [16], [False]),
        ({"AITER_CUSTOM_AR_MAX_SIZE": "4096"}, 1 << 30, [4096, 4112], [True, False]),
        ({"AITER_CUSTOM_AR_MAX_SIZE": "-1"}, 1 << 30, [1 << 20], [True]),
        ({"AITER_CUSTOM_AR_MAX_SIZE": "4096"}, 2048, [1 << 20], [True]),  # more than the pool: the default
        ({"AITER_CUSTOM_AR_MIN_SIZE": "4096"}, 1 << 30, [4096, 4112], [False, True]),
    ],
)
def test_the_gate_by_size(two, environment, max_size, sizes, answers):
    for found in two.run(jobs.gate, environment, sizes, max_size):
        assert [fits for fits, _ in found] == answers
        assert [with_prefill for _, with_prefill in found] == [
            fits and size <= max_size / 2 for fits, size in zip(answers, sizes, strict=True)
        ]


def test_the_record_has_what_a_backend_called_and_not_what_that_called(two):
    x = {"shape": (2, 512), "dtype": BF16, "stride": (512, 1), "is_contiguous": True}
    narrow = {"shape": (2, 48), "dtype": BF16, "stride": (512, 1), "is_contiguous": False}
    w = {"shape": (512,), "dtype": BF16, "stride": (1,), "is_contiguous": True}
    scale = {"shape": (2, 4), "dtype": FP32, "stride": (1, 2), "is_contiguous": False}
    for gated, group, refused in two.run(jobs.recorded):
        assert gated == {
            "method": "custom_fused_ar_rms",
            "args": (x, x, w, 1e-6),
            "kwargs": {"use_1stage": True},
            "outputs": (x, x),
            "error": None,
        }
        assert group["kwargs"] == {"w": w, "eps": 1e-6, "transpose_scale": True}
        assert group["outputs"] == (x | {"dtype": torch.float8_e4m3fn}, x, scale)
        assert (refused["args"], refused["outputs"]) == ((narrow, x), None)
        assert refused["error"].startswith("ValueError: MXFP4 fused quant requires")


@pytest.mark.parametrize("kind", ["plain", "token_fp8", "group_fp8", "mxfp4"])
def test_six_ranks_have_an_all_reduce_and_nothing_fused(two, kind):
    answer, _ = two.run(jobs.launch, 6, 2, 768, kind=kind, use_1stage=True)
    assert answer.startswith("RuntimeError: fused allreduce rmsnorm: unsupported world_size=6")


@pytest.mark.parametrize(
    ("m", "n", "changes", "answer"),
    [
        (81, 8192, {"use_1stage": True}, "1-stage"),
        (1, 8200, {"use_1stage": True}, "2-stage"),  # without a word
        (1, 512, {}, "2-stage"),
        (1, 504, {}, "RuntimeError: fused allreduce rmsnorm: n too small"),
        (1, 504, {"use_1stage": True}, "1-stage"),
        (1, 16384, {}, "2-stage"),
        (1, 16392, {}, "RuntimeError: fused allreduce rmsnorm: n too large"),
        (1, 8192, {"dtype": FP32}, "2-stage"),
        (1, 8196, {"dtype": FP32}, "RuntimeError: fused allreduce rmsnorm: n too large"),
        (1, 4100, {"dtype": FP32, "use_1stage": True}, "2-stage"),
        (1, 516, {}, "RuntimeError: custom allreduce currently requires input length to be multiple of 8"),
        (2, 516, {}, "RuntimeError: fused allreduce rmsnorm requires out_hidden_dim"),
        (2, 512, {"dtype": torch.float64}, "RuntimeError: custom allreduce (plain) does not support torch.float64"),
        (2, 512, {"dtype": torch.int8}, "RuntimeError: custom allreduce (plain) does not support torch.int8"),
        (0, 512, {}, "RuntimeError: HIP error: invalid configuration argument"),
        (32, 8192, {"kind": "token_fp8"}, "2-stage"),  # 512 KiB
        (33, 8192, {"kind": "token_fp8"}, "split"),
        (33, 8192, {"kind": "token_fp8", "use_1stage": True}, "1-stage"),
        (1, 8200, {"kind": "token_fp8", "use_1stage": True}, "nothing"),
        (1, 8320, {"kind": "group_fp8", "use_1stage": True}, "RuntimeError: per-group quant fused kernel: unsupported n"),
        (1, 512, {"kind": "group_fp8", "dtype": FP32}, "RuntimeError: custom allreduce (group_fp8) does not support"),
        (1, 512, {"kind": "mxfp4", "dtype": FP32}, "RuntimeError: custom allreduce (mxfp4) does not support"),
        (32, 8192, {"kind": "mxfp4"}, "2-stage"),
        (33, 8192, {"kind": "mxfp4"}, "RuntimeError: MXFP4 fused kernel: unsupported shape"),
        (33, 8192, {"kind": "mxfp4", "use_1stage": True}, "1-stage"),
        (1, 8224, {"kind": "mxfp4", "use_1stage": True}, "RuntimeError: MXFP4 fused kernel: unsupported shape"),
        (1, 640, {"kind": "mxfp4"}, "2-stage"),
        (1, 640, {"kind": "mxfp4", "emits": True}, "RuntimeError: MXFP4 fused kernel: unsupported shape"),
        (1, 640, {"kind": "mxfp4", "emits": True, "use_1stage": True}, "1-stage"),
    ],
)  # fmt: skip
def test_the_dispatchers_kernels_and_refusals(two, m, n, changes, answer):
    for text in two.run(jobs.launch, 2, m, n, **changes):
        assert text.startswith(answer)


def test_mxfp4_shares_of_a_row_must_be_whole(two):
    answer, _ = two.run(jobs.launch, 8, 1, 288, kind="mxfp4")
    assert answer.startswith("RuntimeError: MXFP4 fused kernel: unsupported shape")
