"""FlashInfer's operator in real graphs: which pattern stands, with which attributes, and that values stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fusion_core import Registry, Strategy
from fusion_core.lift.dialects.flashinfer import DIALECT, FOUR_OVER_SIX
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary.scale_layout import round_up
from tests.dialects.agreement import assert_agree
from tests.support.graphs import Fused, fuse, plugin, registry

pytestmark = pytest.mark.usefixtures("one_rank")

N = 96  # 6 blocks of NVFP4, which swizzling pads to 8, and 3 of MXFP4
EPS = 3e-5
MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


# ---- the operators, in plain torch as their sources say, with their schemas


def packed(x: Tensor) -> Tensor:
    """As ``cvt.rn.satfinite.e2m1x2``: to the nearest, ties to even."""
    midpoints = MIDPOINTS.to(x.device)
    at_or_below = torch.bucketize(x.abs(), midpoints)  # midpoints below |x|: a tie stays below
    above = torch.bucketize(x.abs(), midpoints, right=True)
    codes = torch.where(at_or_below % 2 == 0, at_or_below, above)  # of the two neighbours of a tie, the even one
    codes = codes + torch.signbit(x) * 8
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def swizzled(scale: Tensor, rows: int) -> Tensor:
    """Bytes in tiles of ``rows`` by 4, padded with zeros."""
    tokens, blocks = scale.shape
    padded = scale.new_zeros(round_up(tokens, rows), round_up(blocks, 4))
    padded[:tokens, :blocks] = scale
    height, width = padded.shape
    inner = min(rows, 32)
    tiles = padded.view(height // rows, rows // inner, inner, width // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(height, width)


@torch.library.custom_op("flashinfer::fp4_quantize", mutates_args=())
def fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    enable_pdl: bool | None = None,
    nvfp4_4over6_code: int = -1,
) -> tuple[Tensor, Tensor]:
    is_column_major = input.stride(-2) == 1
    x = input.transpose(-2, -1) if is_column_major else input
    blocks = x.float().reshape(-1, x.shape[-1] // sf_vec_size, sf_vec_size)
    amax = blocks.abs().amax(-1)
    if sf_use_ue8m0:
        exponent = torch.ceil(torch.log2(amax / 6)).clamp(min=-127)  # rounds up
        scale = (exponent + 127).to(torch.uint8)
        factor = torch.where(amax == 0, 0.0, torch.exp2(-exponent))
    else:
        assert global_scale is not None
        multiplier = global_scale.reshape(-1, 1) if global_scale.numel() > 1 else global_scale.reshape(())
        rounded = (multiplier * (amax / 6)).clamp(max=448).to(torch.float8_e4m3fn)
        scale = rounded.view(torch.uint8)
        factor = torch.where(amax == 0, 0.0, 1 / (rounded.float() * (1 / multiplier)))
    codes = packed(blocks * factor.unsqueeze(-1)).reshape(*x.shape[:-1], x.shape[-1] // 2)
    if is_sf_swizzled_layout:
        scale = swizzled(scale, 8 if is_sf_8x4_layout else 128)
    return (codes.transpose(-2, -1), scale.transpose(-2, -1)) if is_column_major else (codes, scale)


@fp4_quantize.register_fake
def _(
    input: Tensor, global_scale: Tensor | None = None, sf_vec_size: int = 16, sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True, is_sf_8x4_layout: bool = False, enable_pdl: bool | None = None,
    nvfp4_4over6_code: int = -1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    is_column_major = input.stride(-2) == 1
    x = input.transpose(-2, -1) if is_column_major else input
    tokens, blocks = x.numel() // x.shape[-1], x.shape[-1] // sf_vec_size
    if is_sf_swizzled_layout:
        tokens, blocks = round_up(tokens, 8 if is_sf_8x4_layout else 128), round_up(blocks, 4)
    codes = x.new_empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8)
    scale = x.new_empty(tokens, blocks, dtype=torch.uint8)
    return (codes.transpose(-2, -1), scale.transpose(-2, -1)) if is_column_major else (codes, scale)


@torch.library.custom_op("vllm::flashinfer_nvfp4_quantize", mutates_args=())
def vllm_nvfp4(a: Tensor, a_global_sf: Tensor) -> tuple[Tensor, Tensor]:
    return fp4_quantize(a, a_global_sf, is_sf_8x4_layout=True)


@vllm_nvfp4.register_fake
def _(a: Tensor, a_global_sf: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = round_up(a.shape[0], 8), round_up(a.shape[1] // 16, 4)
    return a.new_empty(a.shape[0], a.shape[1] // 2, dtype=torch.uint8), a.new_empty(rows, columns, dtype=torch.uint8)


@torch.library.custom_op("vllm::flashinfer_mxfp4_quantize", mutates_args=())
def vllm_mxfp4(a: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return fp4_quantize(a, None, 32, True)


@vllm_mxfp4.register_fake
def _(a: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    rows, columns = round_up(a.shape[0], 128), round_up(a.shape[1] // 32, 4)
    return a.new_empty(a.shape[0], a.shape[1] // 2, dtype=torch.uint8), a.new_empty(rows, columns, dtype=torch.uint8)


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A backend whose strategies are the patterns' own functions, which may run wherever a pattern stands."""
    monkeypatch.delenv(FOUR_OVER_SIX, raising=False)
    strategies = [Strategy(pattern.name, f"own.{pattern.name}", pattern.function) for pattern in CORE_PATTERNS]
    own = plugin(monkeypatch, "own", fusion_strategies=lambda: strategies, fusion_dialects=lambda: [DIALECT])
    return registry(own)


def given(*rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*(rows or (6,)), N, generator=generator) * 3
    x[0] = 0
    return x.to(torch.bfloat16), torch.randn(N, generator=generator).to(torch.bfloat16), torch.tensor([448.0 * 6 / 8])


def normed(x: Tensor, w: Tensor) -> Tensor:
    reduced = funcol.all_reduce(x * 1, "sum", torch.distributed.group.WORLD)
    return torch.nn.functional.rms_norm(reduced, (N,), w, EPS)


def follow(quantise: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose norm is quantised."""
    return lambda x, w, s: quantise(normed(x, w), s)


def refusals(fused: Fused) -> str:
    return "\n".join(str(reason) for decision in fused.site.decisions for reason in decision.reasons)


def check(fused: Fused, model: Callable[..., Any], args: tuple[Any, ...], pattern: str) -> None:
    """The pattern stands, the operator is gone, codes are within one of the operator's, scales byte for byte its own."""
    assert fused.site.pattern == pattern, refusals(fused)
    assert not [target for target in fused.targets() if "flashinfer" in str(target)]
    codes, scale = model(*args)
    assert_agree(fused.results[0], codes)
    assert fused.results[1].dtype == torch.uint8
    assert torch.equal(fused.results[1], scale)


def left(fused: Fused, why: str, pattern: str = "all_reduce_rms_norm") -> None:
    """Only the norm is fused, for this reason."""
    assert fused.site.pattern == pattern
    assert [target for target in fused.targets() if "flashinfer" in str(target)]
    assert why in refusals(fused)


quantize = torch.ops.flashinfer.fp4_quantize
MXFP4 = {"sf_vec_size": 32, "sf_use_ue8m0": True, "is_sf_swizzled_layout": False}


@pytest.mark.parametrize("rows", [(6,), (2, 3), (130,)])
@pytest.mark.parametrize("is_swizzled", [True, False])
@pytest.mark.parametrize("options", [{}, {"nvfp4_4over6_code": 0, "enable_pdl": True}])
def test_nvfp4(using: Registry, rows: tuple[int, ...], is_swizzled: bool, options: dict[str, Any]) -> None:
    model = follow(lambda y, s: quantize(y, s, is_sf_swizzled_layout=is_swizzled, **options))
    fused = fuse(model, *given(*rows), using=using)
    check(fused, model, given(*rows), "all_reduce_rms_norm_nvfp4")
    assert fused.site.attributes["scale_layout"] == ("swizzled_128x4" if is_swizzled else "linear")


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
@pytest.mark.parametrize("options", [{}, {"enable_pdl": False, "nvfp4_4over6_code": -1}])
def test_mxfp4(using: Registry, rows: tuple[int, ...], options: dict[str, Any]) -> None:
    model = follow(lambda y, s: quantize(y, None, **MXFP4, **options))
    fused = fuse(model, *given(*rows), using=using)
    check(fused, model, given(*rows), "all_reduce_rms_norm_mxfp4")
    assert (fused.site.attributes["scale_rounding"], fused.site.attributes["ties"]) == ("up", "even")


OTHERS = {
    "tiles of 8x4": (lambda y, s: quantize(y, s, is_sf_8x4_layout=True), "swizzled in tiles of 8x4"),
    "a scale per token": (lambda y, s: quantize(y, s.expand(6)), "the scale is float32[6]"),
    "another recipe": (lambda y, s: quantize(y, s, nvfp4_4over6_code=1), "nvfp4_4over6_code is 1"),
    "swizzled MXFP4": (
        lambda y, s: quantize(y, None, 32, True),
        "is_sf_swizzled_layout of flashinfer::fp4_quantize is True, needs False",
    ),
    "NVFP4 in tiles of 8x4, by vLLM": (vllm_nvfp4, "swizzles block scales in tiles of 8x4"),
    "swizzled MXFP4, by vLLM": (lambda y, s: vllm_mxfp4(y, "cuda"), "swizzles block scales in tiles of 128x4"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_vocabulary_has_no_name_for_is_left(using: Registry, name: str) -> None:
    quantise, why = OTHERS[name]
    left(fuse(follow(quantise), *given(), using=using), why)


def test_a_column_major_input_is_quantised_along_its_columns_and_left(using: Registry) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
        total = (r + funcol.all_reduce(x * 1, "sum", torch.distributed.group.WORLD)).float()
        return quantize((total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS) * w).to(x.dtype), s)

    x, w, s = given(32)
    fused = fuse(model, x, x.t().contiguous().t(), w, s, using=using)
    left(fused, "with strides (1, 32), needs row-major strides", "all_reduce_add_rms_norm")


def test_the_environment_may_ask_for_another_recipe(using: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOUR_OVER_SIX, "1")
    left(fuse(follow(quantize), *given(), using=using), f"{FOUR_OVER_SIX} is 1")
    assert DIALECT.state is not None
    assert DIALECT.state() is True
    explicit = follow(lambda y, s: quantize(y, s, nvfp4_4over6_code=0))
    check(fuse(explicit, *given(), using=using), explicit, given(), "all_reduce_rms_norm_nvfp4")


def test_every_reading_fits_its_word() -> None:
    from fusion_core import vocabulary

    for name in DIALECT.readings:
        for reading in DIALECT.words_of(name):
            word = getattr(vocabulary, reading.word)
            assert reading.parameters == set(word.signature.parameters), name
            assert set(reading.holders) == set(word.results), name
