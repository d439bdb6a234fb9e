"""The numbers of the model of AITER: each rounding with inputs where its alternatives differ."""

import math

import pytest
import torch

from fusion_core.vocabulary import quantize_group_fp8, quantize_mxfp4, quantize_token_fp8
from fusion_core.workers import WorkerPool
from tests.aiter_backend import model_jobs as jobs
from tests.aiter_backend.model_calls import BF16, CALLS, FP16, FP32, full, normed, ones, run, same_everywhere

ARCHES = ("gfx942", "gfx950")
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
EPS = 1e-6


@pytest.fixture(scope="module")
def two():
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with WorkerPool(4) as pool:
        yield pool


def close(a, b):
    return torch.allclose(a.double(), b.double(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("use_1stage", [True, False])
@pytest.mark.parametrize("kind", CALLS)
def test_the_sum_is_rounded_as_the_architecture_casts(two, arch, use_1stage, kind):
    three_quarters = 3 * 2.0**-9  # of a step of bfloat16 at 1
    for sign in (1, -1):
        _, residual, *_ = run(
            two, arch, kind, [full(sign), full(sign * three_quarters)], full(0), ones(), use_1stage=use_1stage
        )
        assert (residual == sign * (1 if arch == "gfx942" else 1 + 2.0**-7)).all()
        shards = [full(sign, dtype=FP16), full(sign * 3 * 2.0**-12, dtype=FP16)]
        _, residual, *_ = run(two, arch, kind, shards, full(0, dtype=FP16), ones(dtype=FP16), use_1stage=use_1stage)
        assert (residual == sign * (1 + 2.0**-10)).all(), "float16 goes to the nearest everywhere"


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("kind", "use_1stage", "m", "nearest"),
    [
        ("plain", True, 1, False),
        ("plain", False, 1, False),
        ("token_fp8", True, 1, False),
        ("token_fp8", False, 1, True),
        ("token_fp8", False, 513, True),  # more than 512 KiB: a launch for each half
        ("group_fp8", True, 1, False),
        ("group_fp8", False, 1, True),
        ("group_fp8", False, 513, True),
        ("mxfp4", True, 1, False),
        ("mxfp4", False, 1, True),
    ],
)
def test_the_new_residual_is_rounded_by_a_cast_or_by_the_compiler(two, arch, kind, use_1stage, m, nearest):
    given = ([full(1, m=m)], full(3 * 2.0**-9, m=m), ones())
    _, residual, *_ = run(two, arch, kind, *given, use_1stage=use_1stage)
    assert (residual == (1 + 2.0**-7 if nearest or arch == "gfx950" else 1)).all()


def test_the_sum_is_rounded_before_the_residual_comes(two):
    shards, residual = [full(1), full(2.0**-8)], full(2.0**-8)  # two halves of a step
    for use_1stage in (True, False):
        _, out = run(two, "gfx950", "plain", shards, residual, ones(), use_1stage=use_1stage)
        assert (out == 1).all()


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("kind", "use_1stage", "m", "rounded"),
    [
        ("plain", True, 1, False),
        ("plain", False, 1, False),
        ("token_fp8", True, 1, False),
        ("token_fp8", False, 1, True),
        ("token_fp8", False, 513, True),
        ("group_fp8", True, 1, False),
        ("group_fp8", False, 1, True),
        ("group_fp8", False, 513, True),
    ],
)
def test_the_norm_reads_the_sum_before_or_after_its_rounding(two, arch, kind, use_1stage, m, rounded):
    x, eps = 1 + 3 * 2.0**-9, 1.0  # with so large an eps the norm of a constant row depends on it
    weight = (1 + torch.arange(512) / 512).to(BF16)  # enough that the two readings differ after a rounding
    given = ([full(1, m=m)], full(3 * 2.0**-9, m=m), weight)
    out, residual, *rest = run(two, arch, kind, *given, eps=eps, use_1stage=use_1stage)
    source = residual if rounded else torch.full((m, 512), x, dtype=torch.float64)
    other = torch.full((m, 512), x, dtype=torch.float64) if rounded else residual
    if kind == "plain":
        mine, wrong = (truncated(normed(each, weight, eps), arch) for each in (source, other))
        assert torch.equal(out, mine)
        assert (mine != wrong).float().mean() > 0.1
        return
    size = 512 if kind == "token_fp8" else 128
    mine, wrong = (normed(each, weight, eps).unflatten(-1, (-1, size)).amax(-1) for each in (source, other))
    largest = torch.finfo(FP8[arch]).max
    assert close(rest[0] * largest, mine)
    assert not close(rest[0] * largest, wrong)


def truncated(x, arch):
    """float64 to bfloat16 as the kernels' cast has it."""
    if arch == "gfx950":
        return x.to(BF16)
    return (x.float().view(torch.int32) & -65536).view(FP32).to(BF16)


def test_mxfp4_norms_what_it_rounded(two):
    eps = 1.0
    for use_1stage in (True, False):
        given = ([full(1)], full(3 * 2.0**-9), (1 + torch.arange(512) / 512).to(BF16))
        _, residual, _, mirror = run(two, "gfx950", "mxfp4", *given, eps=eps, use_1stage=use_1stage, emit_bf16=True)
        assert torch.equal(mirror, normed(residual, given[2], eps).to(BF16))
        exact = torch.full((1, 512), 1 + 3 * 2.0**-9, dtype=torch.float64)
        assert not torch.equal(mirror, normed(exact, given[2], eps).to(BF16))


@pytest.mark.parametrize("use_1stage", [True, False])
def test_the_weight_comes_last_with_one_stage_and_first_with_two(two, use_1stage):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 512), torch.randn(512)
    out, _ = run(two, "gfx942", "plain", [x], torch.zeros_like(x), weight, use_1stage=use_1stage)
    mean = (x.double().square().sum(-1, keepdim=True).float() / 512) + torch.tensor(EPS)
    scale = mean.double().rsqrt().float()
    last, first = x * scale * weight, x * weight * scale
    assert torch.equal(out, last if use_1stage else first)
    assert not torch.equal(last, first)
    assert torch.allclose(out.double(), normed(x, weight), rtol=5e-7)


@pytest.mark.parametrize("use_1stage", [True, False])
def test_gemma_adds_one_in_float32(two, use_1stage):
    weight = full(2.0**-9)[0]  # 1 + 2**-9 is no bfloat16
    for kind in ("plain", "token_fp8"):
        out, _, *scale = run(
            two, "gfx950", kind, [full(2)], full(0), weight, eps=0.0, use_1stage=use_1stage, gemma_norm=True
        )
        if scale:
            assert scale[0].item() == (torch.tensor(1 + 2.0**-9) / 448).item()
        else:
            assert (out == 1).all()
    for kind in ("group_fp8", "mxfp4"):
        text = run(two, "gfx950", kind, [full(2)], full(0), weight, gemma_norm=True)
        assert text.startswith("TypeError")


def test_nothing_is_rounded_before_the_weight(two):
    torch.manual_seed(1)
    x, weight = torch.randn(8, 512).to(BF16), torch.randn(512).to(BF16)
    out, _ = run(two, "gfx950", "plain", [x], torch.zeros_like(x), weight)
    exact = normed(x, weight).to(BF16)
    early = (normed(x, ones()).to(BF16).float() * weight.float()).to(BF16)
    assert (out != exact).float().mean() < 0.001
    assert (out != early).float().mean() > 0.1


def test_ranks_are_added_in_their_order(four):
    shards = [full(value, dtype=FP32, n=1024) for value in (2.0**24, 1, 1, -(2.0**24))]
    for use_1stage in (True, False):
        _, residual = run(
            four, "gfx950", "plain", shards, torch.zeros(1, 1024), ones(1024, FP32), use_1stage=use_1stage
        )
        assert (residual == 0).all()
    # the plain all-reduce with two stages: each quarter begins with its own rank
    (small,) = same_everywhere([(each,) for each in four.run(jobs.call, "gfx950", "all_reduce", shards)])
    assert (small == 0).all()
    wide = [shard.expand(40, 1024).contiguous() for shard in shards]
    (large,) = same_everywhere([(each,) for each in four.run(jobs.call, "gfx950", "custom_all_reduce", wide)])
    expected = [sum_in_order(shards, rank) for rank in range(4)]
    assert large.view(4, -1).unique(dim=1).flatten().tolist() == expected
    assert len(set(expected)) > 1


def sum_in_order(shards, first):
    acc = shards[first][0, 0]
    for step in range(1, len(shards)):
        acc = acc + shards[(first + step) % len(shards)][0, 0]
    return acc.item()


def test_float32_denormals_are_flushed(two):
    tiny = 2.0**-130
    for dtype in (BF16, FP32):
        _, residual = run(two, "gfx950", "plain", [full(0, dtype=dtype)], full(tiny, dtype=dtype), ones(dtype=dtype))
        assert not residual.float().any()
    _, residual = run(two, "gfx950", "plain", [full(2.0**-24, dtype=FP16)], full(0, dtype=FP16), ones(dtype=FP16))
    assert (residual == 2.0**-24).all(), "float16 has its denormals"


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("use_1stage", [True, False])
@pytest.mark.parametrize("kind", ["token_fp8", "group_fp8", "mxfp4"])
def test_codes_and_scales_are_the_vocabulary_s_of_the_float32_norm(two, arch, use_1stage, kind):
    torch.manual_seed(2)
    x, weight = torch.randn(5, 512).to(FP16), torch.randn(512).to(FP16)
    x[0] = 0
    x[1, :128] = 0
    out, residual, scale, mirror = run(
        two, arch, kind, [x], torch.zeros_like(x), weight, use_1stage=use_1stage, emit_bf16=True
    )
    assert torch.equal(residual, x)
    wide = x.float()
    mean = (wide.double().square().sum(-1, keepdim=True).float() / 512) + torch.tensor(EPS)
    norm = wide * mean.double().rsqrt().float() * weight.float()
    assert torch.equal(mirror, norm.to(FP16))
    if kind == "mxfp4":
        codes, scales = quantize_mxfp4(norm, ties="away")
    elif kind == "group_fp8":
        codes, scales = quantize_group_fp8(norm, dtype=FP8[arch], min_scale=0)
    else:
        codes, scales = quantize_token_fp8(norm, dtype=FP8[arch], min_scale=0)
    assert torch.equal(out, codes.view(torch.uint8))
    assert torch.equal(scale, scales)
    if kind != "mxfp4":
        assert (scale[0] == 1).all(), "a scale of zeros"
        rounded, _ = (quantize_group_fp8 if kind == "group_fp8" else quantize_token_fp8)(
            mirror, dtype=FP8[arch], min_scale=0
        )
        assert not torch.equal(out, rounded.view(torch.uint8)), "it is not the mirror that is quantised"


def test_mxfp4_ties_go_away_from_zero_and_zero_has_no_sign(two):
    bounds = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    below = [value * (1 - 2.0**-10) for value in bounds]
    weight = torch.tensor([*bounds, *below, 6.0, 0.0] * 32, dtype=FP16)
    x = full(1, dtype=FP16)
    x[:, 1::2] = -1
    for use_1stage in (True, False):
        given = ([x], torch.zeros_like(x), weight)
        out, _, scale, mirror = run(two, "gfx950", "mxfp4", *given, eps=0.0, use_1stage=use_1stage, emit_bf16=True)
        assert torch.equal(mirror, x * weight), "the norm of a row of signs is that row"
        assert (scale == 127).all()
        codes = torch.stack((out & 15, out >> 4), -1).flatten()[:16].tolist()
        magnitudes = [*range(1, 8), *range(7), 7]
        assert codes[15] == 0, "-0.0"
        assert codes[:15] == [code + 8 * (index % 2) for index, code in enumerate(magnitudes)]


def test_mxfp4_makes_a_nan_finite(two):
    x = full(1)
    x[0, 3] = math.nan
    out, residual, scale = run(two, "gfx950", "mxfp4", [x], full(0), ones())
    assert residual.isnan().sum() == 1
    assert (scale == 253).all()
    assert (out == 0x77).all()


def test_no_code_is_clamped(two):
    x = full(1, n=640)
    x[0, 600:] = 100  # where FP8's kernel with two stages does not look for a maximum
    out, *_ = run(two, "gfx950", "token_fp8", [x], full(0, n=640), ones(640), eps=0.0)
    assert (out[0, 600:] == 0x7F).all()
    assert (out[0, :600] != 0x7F).all()
