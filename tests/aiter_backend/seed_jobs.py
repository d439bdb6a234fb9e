"""What the workers of `test_seed_cases` run: the seed page's models, compiled, and AITER's calls that they make.

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

import fusion_core
from fusion_aiter import availability, communicators
from fusion_core import Device, FusionConfig, FusionPass, Report
from fusion_core._torch import inductor
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.workspaces.self_check import distance
from tests.aiter_backend.seed_models import (
    EPS,
    FNUZ,
    MODELS,
    QUANTISERS,
    SPELLINGS,
    Block,
    add_norm,
    here,
    largest,
    norm,
)
from tests.dialects import vllm_operators
from tests.dialects.vllm_groups import vllm_groups

PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
ORDER = ("aiter",)

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
    backend = inductor.post_grad_only(lambda graph: heard.append(own.run(graph)))
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True), lambda: heard[0]


def watched(run: Callable[[], Any]) -> tuple[Any, dict[str, int], list[dict[str, Any]], list[float | None]]:
    """What a call gives; the operators and AITER's calls in it."""
    calls, residuals, real = sys.modules["aiter"].calls, [], communicators.call_kernel

    def call(kernel: Any, communicator: Any, x: Tensor, residual: Tensor | None, *rest: Any, **named: Any) -> Any:
        residuals.append(None if residual is None else float(residual.abs().max()))
        return real(kernel, communicator, x, residual, *rest, **named)

    calls.clear()
    with mock.patch.object(communicators, "call_kernel", call), torch.profiler.profile() as profile:
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
