"""FP8 quantisation in plain torch, behind ``norm(residual + all_reduce(x))``: static, per token and per group."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.corpus.case import (
    ADD,
    AFTER,
    FNUZ,
    FP8,
    NORMED,
    PLAIN,
    REDUCED,
    RESIDUAL,
    WIDE,
    Case,
    Given,
    gemma,
    norm,
    reduce,
    wide_norm,
)
from tests.support.device import DEVICE

STATIC, TOKEN, GROUP = (f"{ADD}_{kind}_fp8" for kind in ("static", "token", "group"))
QUANTIZED, SCALE = {"quantized"}, {"scale"}
MAX = torch.finfo(FP8).max  # 448


def scale(*shape: int) -> Given:
    """With a static scale of this shape behind x, residual and weight."""
    return Given(shape=(2, 3, WIDE), more=(lambda: torch.full(shape, 0.05),))


SCALAR = scale()
TOKENS = Given(shape=(2, 3, WIDE))
ROWS = Given(shape=(6, WIDE))


def static(name: str, quantise: Callable[[Tensor, Tensor], Tensor], given: Given = SCALAR, **differing: Any) -> Case:
    """A spelling of a static quantisation ``q(normed, scale)``; the residual lives on."""

    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
        total = r + reduce(x)
        return quantise(norm(total, w), s), total

    return Case(f"static: {name}", model, STATIC, QUANTIZED | RESIDUAL, {**AFTER, **differing}, given)


def dynamic(
    pattern: str, name: str, quantise: Callable[[Tensor], Any], given: Given, differing: dict[str, Any]
) -> Case:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        total = r + reduce(x)
        return quantise(norm(total, w)), total

    return Case(name, model, pattern, QUANTIZED | SCALE | RESIDUAL, {**AFTER, **differing}, given)


def token(name: str, quantise: Callable[[Tensor], Any], given: Given = TOKENS, **differing: Any) -> Case:
    """A spelling of a per-token quantisation ``codes, scale = q(normed)``; the residual lives on."""
    return dynamic(TOKEN, f"per token: {name}", quantise, given, differing)


def group(name: str, quantise: Callable[[Tensor], Any], given: Given = TOKENS, **differing: Any) -> Case:
    """A spelling of a per-group quantisation ``codes, scales = q(normed)``; the residual lives on."""
    return dynamic(GROUP, f"per group: {name}", quantise, given, differing)


def codes(values: Tensor, dtype: torch.dtype = FP8, largest: float = MAX) -> Tensor:
    return values.clamp(-largest, largest).to(dtype)


def amax(n: Tensor) -> Tensor:
    return n.float().abs().amax(-1, keepdim=True)


def per_token(n: Tensor, least: float = 0.0, dtype: torch.dtype = FP8, largest: float = MAX) -> tuple[Tensor, Tensor]:
    """The plainest spelling."""
    s = amax(n) / largest
    s = s.clamp(min=least) if least else s
    return codes(n.float() / s, dtype, largest), s


def with_maximum(n: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.maximum(amax(n), torch.tensor(1e-12)) / MAX
    return codes(n.float() / s), s


def by_multiplier(n: Tensor) -> tuple[Tensor, Tensor]:
    """The codes by 448 / amax, the scale by amax / 448."""
    largest = amax(n).clamp(min=1e-12)
    return codes(n.float() * (MAX / largest)), largest / MAX


def by_reciprocal_of_the_multiplier(n: Tensor) -> tuple[Tensor, Tensor]:
    multiplier = MAX / amax(n).clamp(min=1e-12)
    return codes(n.float() * multiplier), multiplier.reciprocal()


def narrow_maximum(n: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum taken in bfloat16, which is exact."""
    s = n.abs().amax(-1, keepdim=True).float() / MAX
    return codes(n.float() / s), s


def squeezed(n: Tensor) -> tuple[Tensor, Tensor]:
    s = n.float().abs().amax(-1) / MAX
    return codes(n.float() / s[..., None]), s


def flat_tokens(n: Tensor) -> tuple[Tensor, Tensor]:
    flat = n.reshape(-1, n.shape[-1])
    q, s = per_token(flat)
    return q.view(n.shape), s


def torchao(n: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's dynamic row-wise scaling: eps on the maximum, float64 division, clamp, cast."""
    largest = torch.amax(torch.abs(n), dim=-1, keepdim=True).to(torch.float32)
    s = largest.clamp(min=1e-12) / torch.finfo(FP8).max
    return (n.to(torch.float32) * (1.0 / s)).clamp(min=torch.finfo(FP8).min, max=torch.finfo(FP8).max).to(FP8), s


def per_group(
    n: Tensor, g: int = 128, least: float = 0.0, dtype: torch.dtype = FP8, largest: float = MAX
) -> tuple[Tensor, Tensor]:
    """The plainest spelling."""
    groups = n.float().view(*n.shape[:-1], n.shape[-1] // g, g)
    s = groups.abs().amax(-1, keepdim=True) / largest
    s = s.clamp(min=least) if least else s
    return codes(groups / s, dtype, largest).view(n.shape), s.squeeze(-1)


def flat_groups(n: Tensor, g: int = 128) -> tuple[Tensor, Tensor]:
    groups = n.float().view(-1, g)
    s = groups.abs().amax(-1, keepdim=True) / MAX
    return codes(groups / s).view(n.shape), s.view(*n.shape[:-1], -1)


def deep_gemm(n: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepGEMM's ``per_token_cast_to_fp8``."""
    m, k = n.shape
    view = n.view(m, -1, 128)
    largest = view.abs().float().amax(dim=2).view(m, -1).clamp(1e-4)
    return (view * (MAX / largest.unsqueeze(2))).to(FP8).view(m, k), (largest / MAX).view(m, -1)


def unflattened(n: Tensor) -> tuple[Tensor, Tensor]:
    groups = n.unflatten(-1, (-1, 128)).float()
    s = groups.abs().amax(-1) / MAX
    return codes(groups / s.unsqueeze(-1)).flatten(-2), s


def transposed(n: Tensor, g: int = 128) -> tuple[Tensor, Tensor]:
    q, s = per_group(n, g)
    return q, s.t().contiguous().t()


def by_dimensions(n: Tensor) -> tuple[Tensor, Tensor]:
    q, s = per_group(n)
    return q, s.transpose(-1, -2).contiguous().transpose(-1, -2)


def powers(
    rounded: Callable[[Tensor], Tensor], g: int = 128, least: float = 1e-10
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A per-group spelling whose scales are rounded up to powers of two."""

    def quantise(n: Tensor) -> tuple[Tensor, Tensor]:
        groups = n.float().view(*n.shape[:-1], -1, g)
        s = rounded((groups.abs().amax(-1, keepdim=True) / MAX).clamp(min=least))
        return codes(groups / s).view(n.shape), s.squeeze(-1)

    return quantise


def deep_gemm_powers(n: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepGEMM's ``per_token_cast_to_fp8`` with ``use_ue8m0``."""
    m, k = n.shape
    view = n.view(m, -1, 128)
    largest = view.abs().float().amax(dim=2).view(m, -1).clamp(1e-4)
    s = torch.pow(2.0, torch.ceil(torch.log2(largest.abs() / MAX)))
    return (view * (1.0 / s.unsqueeze(2))).to(FP8).view(m, k), s


def live(
    name: str, model: Callable[..., Any], pattern: str, outputs: set[str], given: Given = SCALAR, **differing: Any
) -> Case:
    return Case(f"live: {name}", model, pattern, outputs, {**AFTER, **differing}, given)


def q(n: Tensor, s: Tensor) -> Tensor:
    return codes(n.float() / s)


def matmul(n: Tensor) -> Tensor:
    """What an indexer or a gate does with the norm itself."""
    return n @ EXPERTS


EXPERTS = torch.eye(WIDE, 4).bfloat16().to(DEVICE)
UE8M0 = {"scale_format": "ue8m0", "min_scale": 1e-10}
FLOOR = {"min_scale": 1e-12 / MAX}
VLLM_FLOOR = 1 / (512 * MAX)

CASES = [
    # static: the scale
    static("divide", lambda n, s: codes(n.float() / s)),
    static("multiply by the reciprocal", lambda n, s: codes(n.float() * s.reciprocal())),
    static("multiply by 1 / scale", lambda n, s: codes(n.float() * (1.0 / s))),
    static("multiply by scale ** -1", lambda n, s: codes(s**-1 * n.float())),
    static("scale of [1]", lambda n, s: codes(n.float() / s), scale(1)),
    static("scale of [1, 1]", lambda n, s: codes(n.float() / s), scale(1, 1)),
    static("scale of [1], reciprocal", lambda n, s: codes(n.float() * s.reciprocal()), scale(1)),
    static("scale of [1, 1], 1 / scale", lambda n, s: codes(n.float() * (1 / s)), scale(1, 1)),
    static("scale viewed", lambda n, s: codes(n.float() / s.view(1, 1, 1)), scale(1)),
    static("scale squeezed", lambda n, s: codes(n.float() / s.squeeze()), scale(1)),
    static("scale expanded", lambda n, s: codes(n.float() / s.expand_as(n))),
    # static: the clamp
    static("no clamp", lambda n, s: (n.float() / s).to(FP8)),
    static("clamp(min=, max=)", lambda n, s: (n.float() / s).clamp(min=-MAX, max=MAX).to(FP8)),
    static("torch.clamp of finfo", lambda n, s: torch.clamp(n.float() / s, torch.finfo(FP8).min, torch.finfo(FP8).max).to(FP8)),
    static("clamp_min and clamp_max", lambda n, s: (n.float() / s).clamp_min(-MAX).clamp_max(MAX).to(FP8)),
    static("clamp_max and clamp_min", lambda n, s: (n.float() / s).clamp_max(MAX).clamp_min(-MAX).to(FP8)),
    static("minimum and maximum", lambda n, s: torch.minimum(torch.maximum(n.float() / s, torch.tensor(-MAX)), torch.tensor(MAX)).to(FP8)),
    static("maximum of full tensors", lambda n, s: torch.maximum(torch.minimum(v := n.float() / s, torch.full_like(v, MAX)), torch.full_like(v, -MAX)).to(FP8)),
    static("clamp by tensors", lambda n, s: torch.clamp(n.float() / s, torch.tensor(-MAX), torch.tensor(MAX)).to(FP8)),
    static("hardtanh", lambda n, s: torch.nn.functional.hardtanh(n.float() / s, -MAX, MAX).to(FP8)),
    # static: casts and views
    static("no float(), scale of [1]", lambda n, s: codes(n / s), scale(1)),
    static("no float(), reciprocal of [1]", lambda n, s: codes(n * s.reciprocal()), scale(1)),
    static("to(float32)", lambda n, s: codes(n.to(torch.float32) / s.to(torch.float32))),
    static("flattened", lambda n, s: codes(n.float().view(-1, WIDE) / s)),
    static("flattened and back", lambda n, s: codes(n.view(-1, WIDE).float() / s).view(n.shape)),
    static("contiguous", lambda n, s: codes(n.contiguous().float() / s).contiguous()),
    # static: the other FP8
    static("fnuz", lambda n, s: codes(n.float() / s, FNUZ, 240.0), fp8_dtype=FNUZ),
    static("fnuz to 224", lambda n, s: codes(n.float() / s, FNUZ, 224.0), fp8_dtype=FNUZ, fp8_max=224.0),
    static("fnuz without clamp", lambda n, s: (n.float() / s).to(FNUZ), fp8_dtype=FNUZ),
    # per token: the maximum
    token("divide", per_token),
    token("max().values", lambda n: (codes(n.float() / (s := n.float().abs().max(-1, keepdim=True).values / MAX)), s)),
    token("max()[0]", lambda n: (codes(n.float() / (s := n.float().abs().max(dim=-1, keepdim=True)[0] / MAX)), s)),
    token("max of bfloat16", narrow_maximum),
    token("squeezed", squeezed),
    token("linalg.vector_norm of order inf", lambda n: (codes(n.float() / (s := torch.linalg.vector_norm(n.float(), torch.inf, -1, True) / MAX)), s)),
    token("amax over the last positive index", lambda n: (codes(n.float() / (s := n.float().abs().amax(2, keepdim=True) / MAX)), s)),
    token("of tokens in one dimension", flat_tokens),
    token("of a matrix", per_token, ROWS),
    token("one group for a token", lambda n: per_group(n, WIDE)),
    # per token: the least scale
    token("clamp(min=) of the maximum", lambda n: (codes(n.float() / (s := amax(n).clamp(min=1e-12) / MAX)), s), **FLOOR),
    token("clamp_min of the maximum", lambda n: (codes(n.float() / (s := amax(n).clamp_min(1e-12) / MAX)), s), **FLOOR),
    token("torch.maximum of the maximum", with_maximum, **FLOOR),
    token("vLLM's least scale", lambda n: per_token(n, VLLM_FLOOR), min_scale=VLLM_FLOOR),
    token("torchao", torchao, **FLOOR),
    # per token: multipliers and clamps
    token("multiply by the reciprocal", lambda n: (codes(n.float() * (s := amax(n) / MAX).reciprocal()), s)),
    token("multiply by 1 / scale", lambda n: (codes(n.float() * (1.0 / (s := amax(n) / MAX))), s)),
    token("448 / amax", by_multiplier, **FLOOR),
    token("448 / amax and its reciprocal", by_reciprocal_of_the_multiplier, **FLOOR),
    token("amax * (1 / 448)", lambda n: (codes(n.float() / (s := amax(n) * (1 / MAX))), s)),
    token("no clamp", lambda n: ((n.float() / (s := amax(n) / MAX)).to(FP8), s)),
    token("no float()", lambda n: (codes(n / (s := n.abs().amax(-1, keepdim=True).float() / MAX)), s)),
    token("fnuz", lambda n: per_token(n, 0.0, FNUZ, 240.0), fp8_dtype=FNUZ),
    token("fnuz to 224", lambda n: per_token(n, 0.0, FNUZ, 224.0), fp8_dtype=FNUZ, fp8_max=224.0),
    # per group
    group("view(..., n // g, g)", per_group),
    group("view(-1, g)", flat_groups),
    group("groups of 64", lambda n: per_group(n, 64), group_size=64),
    group("view(-1, 64)", lambda n: flat_groups(n, 64), group_size=64),
    group("unflatten", unflattened),
    group("of a matrix", per_group, ROWS),
    group("a least scale", lambda n: per_group(n, 128, 1e-10), min_scale=1e-10),
    group("vLLM's least scale", lambda n: per_group(n, 128, VLLM_FLOOR), min_scale=VLLM_FLOOR),
    group("DeepGEMM", deep_gemm, ROWS, min_scale=1e-4 / MAX),
    group("transposed scales", transposed, ROWS, scale_layout="column_major"),
    group("transposed scales of 64", lambda n: transposed(n, 64), ROWS, scale_layout="column_major", group_size=64),
    group("transpose(-1, -2)", by_dimensions, ROWS, scale_layout="column_major"),
    group("fnuz", lambda n: per_group(n, 128, 0.0, FNUZ, 240.0), fp8_dtype=FNUZ),
    group("fnuz to 224", lambda n: per_group(n, 128, 0.0, FNUZ, 224.0), fp8_dtype=FNUZ, fp8_max=224.0),
    # per group: powers of two
    group("exp2(ceil(log2))", powers(lambda s: torch.exp2(torch.ceil(torch.log2(s)))), **UE8M0),
    group("pow(2, ceil(log2))", powers(lambda s: torch.pow(2.0, torch.ceil(torch.log2(s)))), **UE8M0),
    group("2 ** log2().ceil()", powers(lambda s: 2 ** s.log2().ceil()), **UE8M0),
    group("powers of two for groups of 64", powers(lambda s: torch.exp2(torch.ceil(torch.log2(s))), 64), **UE8M0, group_size=64),
    group("powers of two with another least scale", powers(lambda s: torch.exp2(torch.ceil(torch.log2(s))), least=1e-6), scale_format="ue8m0", min_scale=1e-6),
    group("DeepGEMM's powers of two", deep_gemm_powers, ROWS, scale_format="ue8m0", min_scale=1e-4 / MAX),
    # what lives on
    live("quant alone", lambda x, r, w, s: q(norm(r + reduce(x), w), s), STATIC, QUANTIZED),
    live("quant and norm", lambda x, r, w, s: (q(n := norm(r + reduce(x), w), s), n), STATIC, QUANTIZED | NORMED),
    live("quant and a matmul of the norm", lambda x, r, w, s: (q(n := norm(h := r + reduce(x), w), s), matmul(n), h), STATIC, QUANTIZED | NORMED | RESIDUAL),
    live("quant and the reduced sum", lambda x, r, w, s: (q(norm(r + (a := reduce(x)), w), s), a), STATIC, QUANTIZED | REDUCED),
    live("quant and everything", lambda x, r, w, s: (q(n := norm(h := r + (a := reduce(x)), w), s), n, h, a), STATIC, QUANTIZED | NORMED | RESIDUAL | REDUCED),
    live("quant twice with one scale", lambda x, r, w, s: (q(n := norm(r + reduce(x), w), s), q(n, s)), STATIC, QUANTIZED),
    live("per token, twice", lambda x, r, w: (per_token(n := norm(r + reduce(x), w)), per_token(n)), TOKEN, QUANTIZED | SCALE, TOKENS),
    live("quant without residual", lambda x, r, w, s: q(norm(reduce(x), w), s), f"{PLAIN}_static_fp8", QUANTIZED),
    live("quant and norm without residual", lambda x, r, w, s: (q(n := norm(reduce(x), w), s), matmul(n)), f"{PLAIN}_static_fp8", QUANTIZED | NORMED),
    live("quant and the sum without residual", lambda x, r, w, s: (q(norm(a := reduce(x), w), s), a), f"{PLAIN}_static_fp8", QUANTIZED | REDUCED),
    live("per token, codes alone", lambda x, r, w: per_token(norm(r + reduce(x), w))[0], TOKEN, QUANTIZED, TOKENS),
    live("per token and norm", lambda x, r, w: (per_token(n := norm(h := r + reduce(x), w)), matmul(n), h), TOKEN, QUANTIZED | SCALE | NORMED | RESIDUAL, TOKENS),
    live("per token without residual", lambda x, r, w: per_token(norm(reduce(x), w)), f"{PLAIN}_token_fp8", QUANTIZED | SCALE, TOKENS),
    live("per token and the sum without residual", lambda x, r, w: (per_token(norm(a := reduce(x), w)), a), f"{PLAIN}_token_fp8", QUANTIZED | SCALE | REDUCED, TOKENS),
    live("per group and norm", lambda x, r, w: (per_group(n := norm(h := r + reduce(x), w)), matmul(n), h), GROUP, QUANTIZED | SCALE | NORMED | RESIDUAL, TOKENS),
    live("per group without residual", lambda x, r, w: per_group(norm(reduce(x), w)), f"{PLAIN}_group_fp8", QUANTIZED | SCALE, TOKENS),
    # other norms before it
    Case("static behind Gemma's norm", lambda x, r, w, s: q(gemma(r + reduce(x), w), s), STATIC, QUANTIZED, {"weight_bias": 1.0}, SCALAR),
    Case("static behind a norm without weight", lambda x, r, w, s: q(norm(r + reduce(x), None), s), STATIC, QUANTIZED, {}, SCALAR, weight=False),
    Case("static behind F.rms_norm", lambda x, r, w, s: q(torch.nn.functional.rms_norm(r + reduce(x), (WIDE,), w, 1e-5), s), STATIC, QUANTIZED, {}, SCALAR),
    Case("per token behind a wide norm", lambda x, r, w: per_token(wide_norm(r + reduce(x), w)), TOKEN, QUANTIZED | SCALE, {}, TOKENS),
    Case("per token of a float32 model", lambda x, r, w: per_token(norm(r + reduce(x), w)), TOKEN, QUANTIZED | SCALE, {}, Given(shape=(2, 3, WIDE), dtype=torch.float32)),
    Case("per group of a float16 model", lambda x, r, w: per_group(norm(r + reduce(x), w)), GROUP, QUANTIZED | SCALE, AFTER, Given(shape=(2, 3, WIDE), dtype=torch.float16)),
    Case("static of a norm that was never rounded", lambda x, r, w, s: q((h := (r + reduce(x)).float()) * torch.rsqrt(h.square().mean(-1, True) + 1e-5) * w.float(), s), STATIC, QUANTIZED, {"norm_dtype": torch.float32}, SCALAR),
]  # fmt: skip
