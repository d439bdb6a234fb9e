"""What the model of AITER makes of calls that AITER does not check, or refuses; and the outputs' layout."""

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.aiter_backend.model_calls import BF16, CALLS, FP32, full, normed, ones, run


@pytest.fixture(scope="module")
def two():
    with WorkerPool(2) as pool:
        yield pool


@pytest.mark.parametrize("emit", [False, True])
def test_order_shapes_and_strides_of_the_outputs(two, emit):
    x, n = full(1, m=3), 512
    mirror = [((3, n), BF16, (n, 1))] * emit
    row = ((3, n), BF16, (n, 1))
    codes, nibbles = ((3, n), torch.uint8, (n, 1)), ((3, n // 2), torch.uint8, (n // 2, 1))
    expected = {
        "plain": [row, row],
        "token_fp8": [codes, row, ((3, 1), FP32, (1, 1)), *mirror],
        "group_fp8": [codes, row, ((3, 4), FP32, (4, 1)), *mirror],
        "mxfp4": [nibbles, row, ((3, 16), torch.uint8, (16, 1)), *mirror],
    }
    for kind, outputs in expected.items():
        flags = {} if kind == "plain" else {"emit_bf16": emit}
        results = run(two, "gfx950", kind, [x], x, ones(), **flags)
        assert [(tuple(each.shape), each.dtype, each.stride()) for each in results] == outputs


def test_transposed_scales(two):
    torch.manual_seed(3)
    x = torch.randn(3, 512).to(BF16)
    for use_1stage in (True, False):
        given = ([x], torch.zeros_like(x), ones())
        *_, rows = run(two, "gfx950", "group_fp8", *given, use_1stage=use_1stage)
        *_, columns = run(two, "gfx950", "group_fp8", *given, use_1stage=use_1stage, transpose_scale=True)
        assert (rows.stride(), columns.stride()) == ((4, 1), (1, 3))
        assert torch.equal(rows, columns)
    for leads, beyond in (((2, 3), True), ((1, 3), True), ((3, 1), False)):
        given = ([torch.ones(*leads, 512, dtype=BF16)], torch.ones(*leads, 512, dtype=BF16), ones())
        results = run(two, "gfx950", "group_fp8", *given, transpose_scale=True)
        assert isinstance(results, str) == beyond
        assert not beyond or results.startswith("AssertionError: the kernel writes")


def test_padded_outputs_and_inputs(two):
    wide = torch.ones(2, 640, dtype=BF16)
    wide[:, 512:] = 7
    for use_1stage in (True, False):
        given = ([wide], torch.zeros(2, 512, dtype=BF16), ones())
        out, residual = run(two, "gfx950", "plain", *given, eps=0.0, use_1stage=use_1stage, out_hidden_dim=768)
        assert (residual == 1).all()
        assert (out[:, :512] == 1).all()
        assert not out[:, 512:].any()
    text = run(two, "gfx950", "plain", [wide], wide, ones(768))
    assert text.startswith("RuntimeError: fused allreduce rmsnorm pad requires input width >= weight width")


@pytest.mark.parametrize("kind", ["token_fp8", "group_fp8"])
@pytest.mark.parametrize(("n", "seen"), [(512, 512), (640, 512), (2816, 2816), (2880, 2816)])
def test_fp8_with_two_stages_forgets_a_partial_warp(two, kind, n, seen):
    torch.manual_seed(4)
    x, size = torch.randn(2, n).to(BF16), 64
    flags = {"emit_bf16": True} | ({"group_size": size} if kind == "group_fp8" else {})
    for m in (2, 400):  # in one launch, and split
        rows = x.repeat(m // 2, 1)
        *_, mirror = run(two, "gfx950", kind, [rows], torch.zeros_like(rows), ones(n), eps=0.0, **flags)
        wrong = rows.double() / (rows[:, :seen].double().square().sum(-1, keepdim=True) / n).sqrt()
        assert torch.equal(mirror, wrong.to(BF16))
    *_, mirror = run(two, "gfx950", kind, [x], torch.zeros_like(x), ones(n), eps=0.0, use_1stage=True, **flags)
    assert torch.equal(mirror, normed(x, ones(n), 0.0).to(BF16))


def test_fp8_with_two_stages_and_no_whole_warp(two):
    _, _, scale = run(two, "gfx950", "token_fp8", [full(1, n=128)], full(0, n=128), ones(128))
    assert (scale == 1).all(), "a maximum over nothing"


@pytest.mark.parametrize(("m", "spoilt"), [(1, [0]), (2, []), (3, [2])])
def test_the_shares_of_two_stages_leave_a_remainder(two, m, spoilt):
    x = full(1, n=520, m=m)  # 65 packs to a row
    out, residual = run(two, "gfx950", "plain", [x], torch.zeros_like(x), ones(520))
    assert residual.isnan().any(-1).nonzero().flatten().tolist() == spoilt
    assert residual.isnan().sum() == 8 * len(spoilt)
    assert out.isnan().all(-1).nonzero().flatten().tolist() == spoilt


def test_fp8_with_two_stages_reads_a_rank_that_does_not_exist(two):
    x = full(1, n=520, m=2)
    _, residual, scale = run(two, "gfx950", "token_fp8", [x], torch.zeros_like(x), ones(520))
    assert residual.isnan().all()
    assert scale.isnan().all()


def test_a_row_too_long_for_a_token_s_scale_leaves_everything_as_it_was(two):
    x = full(1, n=8200)
    out, residual, scale = run(two, "gfx950", "token_fp8", [x], x, ones(8200), use_1stage=True)
    assert (out == 0x7F).all()
    assert residual.isnan().all()
    assert scale.isnan().all()


def test_a_weight_or_residual_of_another_dtype_is_read_as_the_input_s(two):
    x = full(1, m=2)
    out, _ = run(two, "gfx950", "plain", [x], full(0, m=2), torch.ones(512))
    assert out[0, :4].tolist() == [0, 1, 0, 1], "the halves of a float32, the low one first"
    _, residual = run(two, "gfx950", "plain", [x], torch.ones(2, 512), ones())
    assert residual[0, :4].tolist() == [1, 2, 1, 2]
    out, _ = run(two, "gfx950", "plain", [x.float()], full(0, m=2).float(), ones())
    assert out[:, 256:].isnan().all(), "beyond the end of a weight half as long"


def test_strides_are_ignored(two):
    torch.manual_seed(5)
    x = torch.randn(512, 512).to(BF16)
    zero, weight = torch.zeros_like(x), ones()
    _, residual = run(two, "gfx950", "plain", [zero], x.t(), weight)
    assert torch.equal(residual, x)
    _, residual = run(two, "gfx950", "plain", [x.t()], zero, weight)
    assert torch.equal(residual, x)
    _, residual = run(two, "gfx950", "plain", [zero], x[:1].clone().expand(512, 512), weight)
    assert torch.equal(residual[0], x[0])
    assert residual[1:].isnan().all(), "beyond the one row that there is"
    # the one layout that the copy of the input understands, but not MXFP4's
    wide = torch.randn(4, 1024).to(BF16)
    _, residual = run(two, "gfx950", "plain", [wide[:, :512]], zero[:4], weight)
    assert torch.equal(residual, wide[:, :512])
    _, residual, _ = run(two, "gfx950", "mxfp4", [wide[:, :512]], zero[:4], weight)
    assert torch.equal(residual, wide.view(8, 512)[:4])


def apart(x):
    """The same numbers, two bytes off."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def test_misaligned_tensors_fault_unless_they_are_copied(two):
    x, weight = full(1, m=2), ones()
    for residual, w in ((apart(x), weight), (x, apart(weight))):
        assert run(two, "gfx950", "plain", [x], residual, w).startswith("RuntimeError: misaligned address")
    clean = run(two, "gfx950", "plain", [x], x, weight)
    copied = run(two, "gfx950", "plain", [apart(x)], x, weight)
    assert all(torch.equal(a, b) for a, b in zip(clean, copied, strict=True))


@pytest.mark.parametrize("group_size", [0, -8, 12, 24, 96, 1024, 512, 2.0])
def test_groups_that_no_shuffle_reduces(two, group_size):
    x = full(1, n=768)
    text = run(two, "gfx950", "group_fp8", [x], x, ones(768), group_size=group_size)
    assert text.startswith("TypeError" if group_size == 2.0 else "ValueError: per-group quant requires")


@pytest.mark.parametrize("kind", CALLS)
def test_calls_that_are_refused(two, kind):
    x, weight = full(1, m=2), ones()
    text = run(two, "gfx950", kind, [x], x, weight, max_size=1024)
    assert text == "RuntimeError: registered buffer is too small to contain the input"
    text = run(two, "gfx950", kind, [x[:0]], x, weight)
    assert text.startswith("RuntimeError: HIP error: invalid configuration argument")
    for dtype in (torch.int32, torch.float64):
        text = run(two, "gfx950", kind, [x.to(dtype)], x, weight)
        assert text.startswith(("RuntimeError: custom allreduce", "ValueError"))
    if kind == "plain":
        assert "requires residual input/output width" in run(two, "gfx950", kind, [x], full(1, n=256), weight)
    if kind == "token_fp8":
        assert "requires input width == weight width" in run(two, "gfx950", kind, [x], x, ones(256))
    if kind == "mxfp4":
        assert run(two, "gfx950", kind, [full(1, n=48)], x, ones(48)).startswith("ValueError: MXFP4")


def test_a_weight_of_another_width_cuts_the_rows_anew(two):
    """Neither group nor block kernels compare it with the input."""
    x = full(1, n=512, m=2)
    x[0, 256:] = 0
    _, _, scale = run(two, "gfx950", "group_fp8", [x], full(0, m=2), ones(256), eps=0.0)
    assert (scale.flatten()[[0, 1, 4, 5, 6, 7]] == torch.tensor(1.0) / 448).all(), "four rows of 256"
    assert scale.isnan().flatten()[[2, 3]].all(), "the second of them zeros, and no eps"


def test_callers_tensors_are_written_to(two):
    x, out, residual = full(1, m=2), full(0, m=2), full(0, m=2)
    results = run(two, "gfx950", "plain", [x], x, ones(), eps=0.0, out=out, res_out=residual)
    assert (results[0] == 1).all()
    assert (results[1] == 2).all()
    text = run(two, "gfx950", "plain", [x], x, ones(), out=out, res_out=full(0, m=1))
    assert text.startswith("AssertionError: the kernel writes 1024 bytes beyond the end")
    assert run(two, "gfx950", "plain", [x], x, ones(), out=torch.zeros(2, 1024, dtype=BF16)[:, ::2]).startswith(
        "AssertionError: output tensor is not weak-contiguous"
    )
