"""torchao's operators in real graphs: which pattern stands, with which attributes, and that values stay."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchao.prototype.mx_formats.kernels as mx
import torchao.quantization.quant_primitives  # noqa: F401  # registers torchao's own operators
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fusion_core import Registry, Strategy
from fusion_core.lift.dialects.torchao import DIALECT
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary.scale_layout import swizzle_128x4
from tests.support.graphs import Fused, fuse, plugin, registry

pytestmark = pytest.mark.usefixtures("one_rank")

N = 64
EPS = 3e-5
FP8 = torch.float8_e4m3fn
static = torch.ops.torchao.quantize_affine_float8_non_decomposed


# ---- operators that need a GPU, in plain torch: MSLK's with their schemas, torchao's own under its registration


@torch.library.custom_op("triton::quantize_fp8_row", mutates_args=())
def quantize_fp8_row(
    a: Tensor,
    scale_ub: Tensor | None = None,
    zero_start_index_M: Tensor | None = None,
    use_triton: bool = True,
    output_device: torch.device | None = None,
    align_rows_to: int | None = None,
    eps_opt: float | None = 1.0 / 512.0,
) -> tuple[Tensor, Tensor]:
    """As ``_kernel_quantize_fp8_row``: the codes, and a scale for each row without a trailing dimension."""
    amax = a.abs().amax(-1).float().clamp(min=1e-12 if eps_opt is None else eps_opt)
    scale = (amax if scale_ub is None else torch.minimum(amax, scale_ub)) / 448
    return (a.float() / scale.unsqueeze(-1)).clamp(-448, 448).to(FP8), scale


@quantize_fp8_row.register_fake
def _(a: Tensor, *rest: Any, **others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a, dtype=FP8), a.new_empty(a.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("triton::quantize_fp8_tensor", mutates_args=())
def quantize_fp8_tensor(a: Tensor, use_triton: bool = True) -> tuple[Tensor, Tensor]:
    scale = a.abs().max().float().clamp(min=1e-12) / 448
    return (a.float() * (1 / scale)).clamp(-448, 448).to(FP8), scale


@quantize_fp8_tensor.register_fake
def _(a: Tensor, use_triton: bool = True) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a, dtype=FP8), a.new_empty((), dtype=torch.float32)


def quantize_nvfp4(x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As MSLK's ``quantize_nvfp4_kernel``: swizzled scales, at least 2**-9, and the codes."""
    multiplier = x.new_ones(1, dtype=torch.float32)[0] if global_scale is None else global_scale.reshape(-1)[0]
    blocks = x.float().reshape(-1, x.shape[-1] // 16, 16)
    scale = (blocks.abs().amax(-1) / 6 * multiplier).clamp(2**-9, 448).to(FP8)
    scaled = blocks * (multiplier / scale.float()).unsqueeze(-1)
    codes = mx.f32_to_f4_unpacked(scaled.clamp(-6, 6).reshape(-1, x.shape[-1]))
    swizzled = swizzle_128x4(scale)
    return (
        swizzled.view(*x.shape[:-2], -1, swizzled.shape[-1]),
        mx.pack_uint4(codes).view(*x.shape[:-1], x.shape[-1] // 2),
    )


def quantize_stacked(m_sizes: Tensor, x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    scale, codes = quantize_nvfp4(x, global_scale[:1])
    return codes, scale


KERNELS = torch.library.Library("ao", "IMPL")
KERNELS.impl("mslk_quantize_nvfp4", quantize_nvfp4, "CPU")
KERNELS.impl("mslk_quantize_nvfp4_stacked", quantize_stacked, "CPU")


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A backend whose strategies are the patterns' own functions, which may run wherever a pattern stands."""
    # torchao's shape functions divide by Triton's cdiv
    monkeypatch.setattr(mx, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), raising=False)
    strategies = [Strategy(pattern.name, f"own.{pattern.name}", pattern.function) for pattern in CORE_PATTERNS]
    own = plugin(monkeypatch, "own", fusion_strategies=lambda: strategies, fusion_dialects=lambda: [DIALECT])
    return registry(own)


def given(*rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*(rows or (6,)), N, generator=generator) * 3
    x[0] = 0  # the least scale shows
    return x.to(torch.bfloat16), torch.randn(N, generator=generator).to(torch.bfloat16)


def normed(x: Tensor, w: Tensor) -> Tensor:
    reduced = funcol.all_reduce(x * 1, "sum", torch.distributed.group.WORLD)
    return torch.nn.functional.rms_norm(reduced, (N,), w, EPS)


def follow(quantise: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose norm is quantised."""

    def model(x: Tensor, w: Tensor, *scales: Tensor) -> Any:
        return quantise(normed(x, w), *scales)

    return model


def refusals(fused: Fused) -> str:
    return "\n".join(str(reason) for decision in fused.site.decisions for reason in decision.reasons)


def check(fused: Fused, model: Callable[..., Any], args: tuple[Any, ...], operator: str, pattern: str) -> None:
    """The pattern stands, the operator is gone, and every value is what the operator gave."""
    assert fused.site.pattern == pattern, refusals(fused)
    assert not [target for target in fused.targets() if operator in str(target)]
    wanted, results = model(*args), fused.results
    pairs = [(results, wanted)] if isinstance(wanted, Tensor) else zip(results, wanted, strict=True)
    for got, want in pairs:
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=0)


def left(fused: Fused, operator: str, pattern: str, why: str) -> None:
    """Only the norm is fused, for this reason."""
    assert fused.site.pattern == pattern
    assert [target for target in fused.targets() if operator in str(target)]
    assert why in refusals(fused)


# ---- FP8 with one scale


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [(), (FP8,), (torch.float8_e4m3fnuz,)])
def test_a_static_scale(using: Registry, shape: tuple[int, ...], dtype: tuple[torch.dtype, ...]) -> None:
    model = follow(lambda y, s: static(y, s, *dtype))
    args = (*given(), torch.full(shape, 0.02))
    fused = fuse(model, *args, using=using)
    check(fused, model, args, "torchao", "all_reduce_rms_norm_static_fp8")
    assert fused.site.attributes["fp8_dtype"] == (dtype[0] if dtype else FP8)
    assert fused.site.attributes["fp8_max"] is None


@pytest.mark.parametrize(
    ("scale", "dtype", "why"),
    [
        (torch.full((6, 1), 0.02), FP8, "the scale is float32[6, 1], needs one float32"),
        (torch.tensor(0.02, dtype=torch.bfloat16), FP8, "the scale is bfloat16[], needs one float32"),
        (torch.tensor(0.02), torch.float8_e5m2, "quantises to float8_e5m2"),
    ],
)
def test_another_scale_or_dtype_is_left(using: Registry, scale: Tensor, dtype: torch.dtype, why: str) -> None:
    model = follow(lambda y, s: static(y, s, dtype))
    args = (*given(), scale)
    fused = fuse(model, *args, using=using)
    left(fused, "quantize_affine_float8_non_decomposed", "all_reduce_rms_norm", why)
    torch.testing.assert_close(fused.results.float(), model(*args).float())


# ---- FP8 with one scale per row


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, None), ({"eps_opt": 0.25}, 0.25 / 448), ({"eps_opt": None}, 1e-12 / 448), ({"scale_ub": None}, None)],
)
@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_a_scale_per_row(using: Registry, options: dict[str, Any], least: float | None, rows: tuple[int, ...]) -> None:
    model = follow(lambda y: torch.ops.triton.quantize_fp8_row(y, **options))
    fused = fuse(model, *given(*rows), using=using)
    check(fused, model, given(*rows), "triton", "all_reduce_rms_norm_token_fp8")
    assert fused.site.attributes["min_scale"] == least
    assert fused.site.attributes["fp8_dtype"] == FP8


def test_scales_as_torchao_shapes_them(using: Registry) -> None:
    def rowwise(y: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = torch.ops.triton.quantize_fp8_row(y, scale_ub=None)
        return codes, scale.reshape(y.shape[0], 1)

    model = follow(rowwise)
    check(fuse(model, *given(), using=using), model, given(), "triton", "all_reduce_rms_norm_token_fp8")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scale_ub": torch.tensor(1.5)}, "scale_ub of triton::quantize_fp8_row is a tensor"),
        ({"align_rows_to": 64}, "align_rows_to of triton::quantize_fp8_row is 64"),
        ({"use_triton": False}, "use_triton of triton::quantize_fp8_row is False"),
    ],
)
def test_rows_in_another_way_are_left(using: Registry, options: dict[str, Any], why: str) -> None:
    model = follow(lambda y: torch.ops.triton.quantize_fp8_row(y, **options))
    fused = fuse(model, *given(), using=using)
    left(fused, "quantize_fp8_row", "all_reduce_rms_norm", why)


def test_a_scale_for_the_tensor_found_at_run_time_is_left(using: Registry) -> None:
    model = follow(torch.ops.triton.quantize_fp8_tensor)
    left(fuse(model, *given(), using=using), "quantize_fp8_tensor", "all_reduce_rms_norm", "one scale for the whole")


# ---- NVFP4


def nvfp4(y: Tensor, per_tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As ``NVFP4Tensor.to_nvfp4`` calls it, which knows the reciprocal of the operator's global scale."""
    scale, codes = mx.mslk_quantize_nvfp4(y, per_tensor_scale)
    return codes, scale


def test_nvfp4(using: Registry) -> None:
    # all blocks above the least scale
    x, w = given()
    args = (x[1:], w.abs() + 0.1, torch.tensor(30 / (448 * 6)))
    fused = fuse(follow(nvfp4), *args, using=using)
    check(fused, follow(nvfp4), args, "mslk", "all_reduce_rms_norm_nvfp4")
    assert fused.site.attributes["scale_layout"] == "swizzled_128x4"
    assert fused.site.attributes["inputs"]["global_scale"] == "float32[]"


@pytest.mark.parametrize(
    ("quantise", "rows", "why"),
    [
        (lambda y, s: mx.mslk_quantize_nvfp4(y, None), (6,), "the operator has no global scale, needs one float32"),
        (lambda y, s: torch.ops.ao.mslk_quantize_nvfp4(y, s.expand(6)), (6,), "the scale is float32[6]"),
        (nvfp4, (128, 2), "the operator quantises bfloat16[128, 2, 64], needs two dimensions"),
    ],
)
def test_nvfp4_with_other_scales_is_left(
    using: Registry, quantise: Callable[..., Any], rows: tuple[int, ...], why: str
) -> None:
    args = (*given(*rows), torch.tensor(0.01))
    fused = fuse(follow(quantise), *args, using=using)
    left(fused, "mslk_quantize_nvfp4", "all_reduce_rms_norm", why)


def test_nvfp4_of_experts_is_left(using: Registry) -> None:
    model = follow(lambda y, s: torch.ops.ao.mslk_quantize_nvfp4_stacked(y.new_ones(1, dtype=torch.int64) * 6, y, s)[0])
    fused = fuse(model, *given(), torch.ones(1), using=using)
    left(fused, "stacked", "all_reduce_rms_norm", "a global scale for each expert")


def test_every_reading_fits_its_operator() -> None:
    from fusion_core import vocabulary

    for name in DIALECT.readings:
        for reading in DIALECT.words_of(name):
            word = getattr(vocabulary, reading.word)
            assert reading.parameters == set(word.signature.parameters), name
            assert set(reading.holders) == set(word.results), name
