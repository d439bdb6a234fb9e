"""What the workers of `test_seed_cases` run: models in two spellings, compiled, and AITER's calls that they make.

A worker's CPU counts as the GPU of its first job for the rest of its life (see `as_amd`).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

import fusion_core
from fusion_aiter import availability, launch
from fusion_core import Device, FusionConfig, FusionPass, Report, _inductor
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary.fp4 import quantize_mxfp4
from fusion_core.workspaces.self_check import distance
from tests.corpus.quantisation import per_group, per_token
from tests.dialects import vllm_operators
from tests.dialects.vllm_groups import vllm_groups

PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
ORDER = ("aiter",)
EPS = 1e-6
FNUZ = torch.float8_e4m3fnuz
FP8 = {"gfx942": FNUZ, "gfx950": torch.float8_e4m3fn}

_held = ExitStack()


def stand_up(arch: str) -> None:
    """The AITER of this worker, with the CPU as such a GPU, behind the entry point that is installed."""
    if "tests.aiter_backend.as_amd" not in sys.modules:
        os.environ["GPU_ARCHS"] = arch
        from tests.aiter_backend import as_amd
        from tests.dialects import test_flashinfer  # noqa: F401  # defines flashinfer::fp4_quantize

        real = availability.unavailable

        def unavailable(device: Device) -> Any:
            with mock.patch.object(torch.version, "hip", "7.2.1"):
                yield from tuple(real(Device("cuda", device.arch)))

        availability.unavailable = unavailable  # type: ignore[assignment]
        assert tuple(as_amd.fusion_available(as_amd.HERE)) == ()
        _held.enter_context(vllm_groups(tp_0=dist.group.WORLD))
        vllm_operators.FP8 = here()  # vLLM's current_platform.fp8_dtype()
    assert os.environ["GPU_ARCHS"] == arch, "a worker is one GPU"


def here() -> torch.dtype:
    """The GPU's FP8."""
    return FP8[os.environ["GPU_ARCHS"]]


class Spelling(NamedTuple):
    """How a model writes its steps."""

    reduce: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gemm: Callable[[Tensor, Tensor], Tensor]


def wide_norm(h: Tensor, weight: Tensor) -> Tensor:
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).type_as(h)


def plain_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return wide_norm(total, weight), total


SPELLINGS = {
    "vllm": Spelling(
        lambda x: torch.ops.vllm.all_reduce(x, "tp:0"),
        lambda x, weight: torch.ops.vllm_ir.rms_norm(x, weight, EPS),
        lambda x, residual, weight: torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, EPS),
        lambda x, weight: torch.ops.vllm.rocm_unquantized_gemm(x, weight),
    ),
    "torch": Spelling(
        lambda x: funcol.all_reduce(x, "sum", dist.group.WORLD),
        wide_norm,
        plain_add_norm,
        lambda x, weight: x @ weight.t(),
    ),
}


def largest() -> float:
    return torch.finfo(here()).max


def static_buffers(n: Tensor, groups: int, column_major: bool = False) -> tuple[Tensor, Tensor]:
    shape, strides = ((n.shape[0], groups), (1, n.shape[0]) if column_major else (groups, 1))
    return torch.empty_like(n, dtype=here()), torch.empty_strided(shape, strides, dtype=torch.float32)


def vllm_group(n: Tensor, column_major: bool = False) -> tuple[Tensor, Tensor]:
    q, s = static_buffers(n, n.shape[1] // 128, column_major)
    torch.ops._C.per_token_group_fp8_quant(
        n, q, s, 128, 1e-10, -largest(), largest(), False, column_major, False
    )  # fmt: skip
    return q, s


def vllm_token(n: Tensor) -> tuple[Tensor, Tensor]:
    q, s = static_buffers(n, 1)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(q, n, s, None)
    return q, s


def plain_transposed(n: Tensor) -> tuple[Tensor, Tensor]:
    q, s = per_group(n, 128, 0.0, here(), largest())
    return q, s.t().contiguous().t()


QUANTISERS: dict[str, Callable[[Tensor], Any]] = {
    "triton": lambda n: torch.ops.vllm.triton_per_token_group_quant_fp8(n, 128),
    "aiter": lambda n: torch.ops.vllm.rocm_aiter_group_fp8_quant(n, 128),
    "aiter transposed": lambda n: torch.ops.vllm.rocm_aiter_group_fp8_quant(n, 128, True),
    "cuda": vllm_group,
    "cuda transposed": lambda n: vllm_group(n, True),
    "torch": lambda n: per_group(n, 128, 0.0, here(), largest()),
    "torch to 224": lambda n: per_group(n, 128, 0.0, here(), 224.0),
    "torch to 224 in the other format": lambda n: per_group(
        n, 128, 0.0, next(f for f in FP8.values() if f != here()), 224.0
    ),
    "torch transposed": plain_transposed,
    "cuda token": vllm_token,
    "aiter token": lambda n: torch.ops.vllm.rocm_aiter_per_token_quant(n, here()),
    "torch token": lambda n: per_token(n, 0.0, here(), largest()),
    "flashinfer mxfp4": lambda n: torch.ops.flashinfer.fp4_quantize(n, None, 32, True, False),
    "torch mxfp4": quantize_mxfp4,
}


# The seed page's classes, as its ``pattern`` methods have them: the model, and what it returns by name.

Model = tuple[Callable[..., tuple[Tensor, ...]], str]


def add_group_quant(s: Spelling, quantise: Any) -> Model:
    def pattern(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        rms, residual_out = s.add_norm(s.reduce(x), residual, weight)
        quant, scale = quantise(rms)
        return quant, scale, residual_out

    return pattern, "quantized scale residual_out"


def add_group_quant_with_indexer(s: Spelling, quantise: Any) -> Model:
    def pattern(residual: Tensor, x: Tensor, weight: Tensor, indexer: Tensor) -> tuple[Tensor, ...]:
        rms, res_out = s.add_norm(s.reduce(x), residual, weight)
        quant, scale = quantise(rms)
        return quant, scale, res_out, s.gemm(rms, indexer), rms

    return pattern, "quantized scale residual_out indexed normed"


def group_quant(s: Spelling, quantise: Any) -> Model:
    def pattern(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(quantise(s.norm(s.reduce(x), weight)))

    return pattern, "quantized scale"


def norm(s: Spelling, quantise: Any) -> Model:
    def pattern(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        reduced = s.reduce(x)
        return s.norm(reduced, weight), reduced

    return pattern, "normed reduced"


def add_norm(s: Spelling, quantise: Any) -> Model:
    def pattern(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return s.add_norm(s.reduce(x), residual, weight)

    return pattern, "normed residual_out"


def with_gemma(make: Callable[..., Model]) -> Callable[..., Model]:
    """The same with the weight that Gemma stores, as vLLM gives it to its norms."""

    def gemma(s: Spelling, quantise: Any) -> Model:
        return make(
            s._replace(
                norm=lambda x, weight: s.norm(x, weight.float() + 1.0),
                add_norm=lambda x, residual, weight: s.add_norm(x, residual, weight.float() + 1.0),
            ),
            quantise,
        )

    return gemma


MODELS: dict[str, Callable[..., Model]] = {
    "AiterAllreduceFusedAddRMSNormGroupQuantFP8Pattern": add_group_quant,
    "AiterAllreduceFusedAddRMSNormGroupQuantWithIndexerPattern": add_group_quant_with_indexer,
    "AiterAllreduceFusedRMSNormGroupQuantFP8Pattern": group_quant,
    "AllReduceRMSNormPattern": norm,
    "AllReduceFusedAddRMSNormPattern": add_norm,
    "AllReduceGemmaRMSNormPattern": with_gemma(norm),
    "AllReduceFusedAddGemmaRMSNormPattern": with_gemma(add_norm),
    "Gemma with group quantisation": with_gemma(add_group_quant),
}


def inputs(function: Callable[..., Any], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """What a model takes, by the names of its parameters: x differs between ranks, the others do not."""
    common, hidden = torch.Generator().manual_seed(0), shape[-1]
    made = {
        "x": torch.randn(shape, generator=torch.Generator().manual_seed(1 + dist.get_rank())).bfloat16(),
        "residual": torch.randn(shape, generator=common).bfloat16(),
        "weight": (torch.rand(hidden, generator=common) + 0.5).bfloat16(),
        "indexer": (torch.randn(8, hidden, generator=common) / hidden**0.5).bfloat16(),
    }
    return {name: made[name] for name in inspect.signature(function).parameters}


def in_float64(given: dict[str, Tensor], gemma: bool) -> dict[str, Tensor]:
    """Every value that a model may return, but for codes and their scales."""
    found = {"reduced": given["x"].double()}
    dist.all_reduce(found["reduced"])
    found["residual_out"] = total = found["reduced"] + given["residual"] if "residual" in given else found["reduced"]
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS)
    found["normed"] = total * inverse * (given["weight"].double() + gemma)
    if "indexer" in given:
        found["indexed"] = found["normed"] @ given["indexer"].double().t()
    return found


class Seen(NamedTuple):
    """What became of a model.

    Attributes:
        sites: Pattern, strategy and live outputs of each place.
        reasons: Why other strategies were not chosen, as one text.
        ran: Operators of all-reduces, norms and quantisers that a run calls, and how often.
        calls: What it calls on AITER's communicator.
        residuals: Of each call the largest number in the residual that AITER was given; None where it was given none.
        off: Of each result its distance from float64, in units of what its dtype allows.
    """

    sites: list[tuple[str, str | None, frozenset[str]]]
    reasons: str
    ran: dict[str, int]
    calls: list[dict[str, Any]]
    residuals: list[float | None]
    off: dict[str, float]


def compiled(function: Callable[..., Any], config: FusionConfig, public: bool) -> tuple[Any, Callable[[], Report]]:
    """The function compiled with the backend, by the public door or up to Inductor's post-grad graph; its report."""
    torch._dynamo.reset()
    if public:
        last = fusion_core.last_report
        return fusion_core.compile(function, config, fullgraph=True), last  # type: ignore[return-value]
    own, heard = FusionPass(config), []
    backend = _inductor.post_grad_only(lambda graph: heard.append(own.run(graph)))
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True), lambda: heard[0]


def watched(run: Callable[[], Any]) -> tuple[Any, dict[str, int], list[dict[str, Any]], list[float | None]]:
    """What a call gives; the operators and AITER's calls in it."""
    calls, residuals, real = sys.modules["aiter"].calls, [], launch.call

    def call(kernel: Any, communicator: Any, x: Tensor, residual: Tensor | None, *rest: Any, **named: Any) -> Any:
        residuals.append(None if residual is None else float(residual.abs().max()))
        return real(kernel, communicator, x, residual, *rest, **named)

    calls.clear()
    with mock.patch.object(launch, "call", call), torch.profiler.profile() as profile:
        results = run()
    names = ("_c10d_functional::", "c10d::allreduce_", "vllm::", "vllm_ir::", "_C::", "flashinfer::", "fusion_aiter::")
    ran = {each.key: each.count for each in profile.key_averages() if each.key.startswith(names)}
    return results, ran, list(calls), residuals


def told(report: Report) -> tuple[list[tuple[str, str | None, frozenset[str]]], str]:
    sites = [(site.pattern, site.strategy, frozenset(site.attributes["live"])) for site in report.sites]
    decisions = [each for site in report.sites for each in site.decisions]
    return sites, "\n".join(f"{each.strategy}: {reason}" for each in decisions for reason in each.reasons)


def one(
    arch: str,
    model: str,
    spelling: str,
    quantiser: str = "",
    shape: tuple[int, ...] = (6, 512),
    *,
    options: tuple[str, ...] = (),
    public: bool = False,
    dynamic: bool = False,
    max_tokens: int | None = None,
) -> Seen:
    """One class of the seed page."""
    stand_up(arch)
    function, returns = MODELS[model](SPELLINGS[spelling], QUANTISERS.get(quantiser))
    given = inputs(function, shape)
    if dynamic:
        for name in given.keys() & {"x", "residual"}:
            torch._dynamo.mark_dynamic(given[name], 0)
    with torch.no_grad():
        run, report = compiled(function, FusionConfig(order=ORDER, options=options, max_tokens=max_tokens), public)
        run(**given)
        results, *seen = watched(lambda: run(**given))
    found = dict(zip(returns.split(), results, strict=True))
    start = "all_reduce_add_rms_norm" if "residual" in given else "all_reduce_rms_norm"
    kind = next((kind for word, kind in KINDS.items() if word in quantiser), "_group_fp8") if quantiser else ""
    most = 224.0 if "224" in quantiser or (here() == FNUZ and quantiser in ("triton", "cuda token")) else largest()
    worst = off(PATTERNS[start + kind], found, in_float64(given, "Gemma" in model), most)
    return Seen(*told(report()), *seen, worst)


KINDS = {"token": "_token_fp8", "mxfp4": "_mxfp4"}


def off(pattern: Any, found: dict[str, Tensor], exact: dict[str, Tensor], most: float) -> dict[str, float]:
    """How far each result is from float64: codes by their scales, scales that are numbers also by themselves."""
    worst = {}
    for name, result in found.items():
        if name == "quantized":
            worst[name] = distance(pattern, {name: result, "scale": found["scale"]}, exact, {})
        elif name == "indexed":
            worst[name] = float((result - exact[name]).abs().max() / exact[name].abs().max()) / 2**-5
        elif name != "scale":
            worst[name] = distance(pattern, {name: result}, exact, {})
        elif result.is_floating_point():
            groups = exact["normed"].unflatten(-1, (result.shape[-1], -1)).abs().amax(-1)
            worst[name] = float((result * most / groups - 1).abs().max()) / 2**-6  # four roundings to bfloat16
    return worst


def by_hand(arch: str, pattern: str, outputs: tuple[str, ...]) -> Seen:
    """A pattern's eager function: the door for a word that no operator or spelling in a graph reads as."""
    stand_up(arch)
    function, config = getattr(fusion_core.ops, pattern), FusionConfig(order=ORDER)
    given = inputs((add_norm if "_add_" in pattern else norm)(SPELLINGS["torch"], None)[0], (6, 512))

    def run() -> Any:
        return function(**given, eps=EPS, config=config, outputs=outputs)

    run()
    results, *seen = watched(run)
    found = dict(zip(outputs, results, strict=True))
    return Seen([], "", *seen, off(PATTERNS[pattern], found, in_float64(given, False), 0.0))


class Block(torch.nn.Module):
    """Embedding and two layers as DeepSeek's have them, tensor parallel: five all-reduces.

    A plain norm first, then norms that feed FP8 projections, one of which an indexer reads too, and a plain one last.
    """

    def __init__(self, s: Spelling, quantise: Any, hidden: int) -> None:
        super().__init__()
        self.s, self.quantise = s, quantise
        common, own = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4 + dist.get_rank())
        self.norms = torch.nn.ParameterList((torch.rand(hidden, generator=common) + 0.5).bfloat16() for _ in range(5))
        self.indexer = torch.nn.Parameter((torch.randn(8, hidden, generator=common) / hidden**0.5).bfloat16())
        self.parts = torch.nn.ParameterList(
            (torch.randn(hidden, hidden, generator=own) / hidden**0.5).bfloat16() for _ in range(5)
        )

    def quantised(self, normed: Tensor) -> Tensor:
        """What an FP8 projection reads."""
        codes, scale = self.quantise(normed)
        return (codes.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)).flatten(-2).to(normed.dtype)

    def forward(self, x: Tensor) -> Tensor:
        s = self.s
        residual = s.reduce(x @ self.parts[0])
        normed = s.norm(residual, self.norms[0])
        normed, residual = s.add_norm(s.reduce(normed @ self.parts[1]), residual, self.norms[1])
        projected = self.quantised(normed) @ self.parts[2]
        normed, residual = s.add_norm(s.reduce(projected), residual, self.norms[2])
        chosen = s.gemm(normed, self.indexer).sum(-1, keepdim=True)
        projected = self.quantised(normed) @ self.parts[3] + chosen
        normed, residual = s.add_norm(s.reduce(projected), residual, self.norms[3])
        projected = self.quantised(normed) @ self.parts[4]
        normed, _ = s.add_norm(s.reduce(projected), residual, self.norms[4])
        return normed


def block(arch: str, spelling: str, quantiser: str, public: bool) -> Seen:
    """`Block` as one graph; ``off`` is its error and that of the unfused one, as parts of the answer."""
    stand_up(arch)
    module = Block(SPELLINGS[spelling], QUANTISERS[quantiser], 512)
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        unfused = module(x)
        run, report = compiled(module, FusionConfig(order=ORDER), public)
        run(x)
        found, *seen = watched(lambda: run(x))
        module.double()
        module.s = SPELLINGS["torch"]._replace(norm=exact_norm, add_norm=lambda x, r, w: (exact_norm(x + r, w), x + r))
        module.quantised = lambda normed: normed  # type: ignore[method-assign]
        exact = module(x.double())
    errors = {
        name: float((each - exact).norm() / exact.norm()) for name, each in (("fused", found), ("plain", unfused))
    }
    return Seen(*told(report()), *seen, errors)


def exact_norm(h: Tensor, weight: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight
