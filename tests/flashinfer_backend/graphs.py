"""What the workers of `test_graphs` run: compiled functions whose operators call the stand-in.

A CPU counts as an H100 here, so that all that stands between torch.compile and FlashInfer is the real thing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed._functional_collectives import all_reduce

import fusion_core
from fusion_core import Device, FusionConfig
from fusion_core.patterns import CORE_PATTERNS
from fusion_flashinfer import availability
from fusion_flashinfer.workspaces import WORKSPACES
from tests.dialects import vllm_operators  # noqa: F401  # defines them
from tests.flashinfer_backend import stand_in
from tests.flashinfer_backend.forms import faster, only
from tests.flashinfer_backend.jobs import elements, fresh
from tests.flashinfer_backend.one_call import BY_NAME, inputs
from tests.flashinfer_backend.one_call import off as off_by

PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
H100 = Device("cuda", "sm_90")
HIDDEN = 256
CONFIG = FusionConfig(order=("flashinfer",), table="none")


def compiled(function: Any, config: FusionConfig = CONFIG) -> Any:
    """By the public door, anew; in workers alone, since it is there that a CPU counts as an H100."""
    Device.of = classmethod(lambda cls, device: H100)  # type: ignore[method-assign, assignment]
    availability.unavailable = lambda device: iter(())  # type: ignore[assignment]
    torch._dynamo.reset()
    return fusion_core.compile(function, config, fullgraph=True)


def chosen() -> list[str | None]:
    """The strategies of the last graph."""
    report = fusion_core.last_report()
    assert report is not None
    return [site.strategy for site in report.sites]


def one(
    kernel_name: str, config: FusionConfig = CONFIG, two_shot: bool = False, tokens: int = 6
) -> tuple[list[str | None], list[tuple[bool, bool]], float]:
    """A function that is one pattern, all of a kernel's outputs live.

    Returns:
        Strategies, of each call whether it is one-shot and whether it has PDL, distance from float64.
    """
    fresh()
    kernel = BY_NAME[kernel_name]
    pattern, group = PATTERNS[kernel.pattern], dist.group.WORLD.group_name
    given = inputs(kernel, tokens, HIDDEN, torch.bfloat16, 0.0, dist.get_rank())
    if kernel.quantization == "group_fp8":
        given["scale_format"] = "ue8m0_packed"
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    scalars = {name: value for name, value in given.items() if name not in tensors}

    def model(**own: Tensor) -> tuple[Tensor, ...]:
        returned = pattern.function(**own, **scalars, group=group)
        results = dict(zip(pattern.outputs, returned if isinstance(returned, tuple) else (returned,), strict=True))
        return tuple(results[name] for name in kernel.outputs)

    def packed(**own: Tensor) -> tuple[Tensor, ...]:
        """Scales packed into int32, which are read where an operator makes them, here vLLM's."""
        wide = {name: value for name, value in scalars.items() if name in ("eps", "weight_bias")}
        plain = PATTERNS[kernel.pattern.removesuffix("_group_fp8")]
        results = dict(zip(plain.outputs, plain.function(**own, **wide, group=group), strict=True))
        normed = results["normed"]
        results["quantized"] = torch.empty_like(normed, dtype=torch.float8_e4m3fn)
        columns, stride = (HIDDEN // 128 + 3) // 4, (tokens + 3) // 4 * 4
        results["scale"] = torch.empty_strided((tokens, columns), (1, stride), dtype=torch.int32)
        torch.ops._C.per_token_group_fp8_quant_packed(
            normed, results["quantized"], results["scale"], 128, 1e-10, -448.0, 448.0
        )
        return tuple(results[name] for name in kernel.outputs)

    with torch.no_grad(), only(two_shot=two_shot):
        run = compiled(packed if kernel.quantization == "group_fp8" else model, config)
        run(**tensors)
        stand_in.calls.clear()
        found = dict(zip(kernel.outputs, run(**tensors), strict=True))
    return (
        chosen(),
        [(call.one_shot, call.pdl) for call in stand_in.calls],
        off_by(pattern, found, tensors, scalars, group),
    )


class Block(nn.Module):
    """Embedding, two half layers and a last norm of a tensor-parallel model: four all_reduces."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        common = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(torch.rand(HIDDEN, generator=common) + 0.5 for _ in range(layers + 1))
        own = torch.Generator().manual_seed(2 + dist.get_rank())
        self.parts = nn.ParameterList(
            torch.randn(HIDDEN, HIDDEN, generator=own) / HIDDEN**0.5 for _ in range(layers + 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = all_reduce(x @ self.parts[0], "sum", dist.group.WORLD)
        normed = nn.functional.rms_norm(residual, (HIDDEN,), self.weights[0], 1e-5)
        for weight, part in zip(self.weights[1:], self.parts[1:], strict=True):
            residual = residual + all_reduce(normed @ part, "sum", dist.group.WORLD)
            normed = nn.functional.rms_norm(residual, (HIDDEN,), weight, 1e-5)
        return normed


def block(seed: int, tokens: int) -> tuple[Block, Tensor]:
    return Block(), torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def model() -> tuple[list[str | None], list[int], float]:
    """Strategies, the patterns of FlashInfer's calls, distance of the answer from float64."""
    fresh()
    module, x = block(0, 5)
    with torch.no_grad():
        run = compiled(module)
        run(x)
        stand_in.calls.clear()
        found = run(x)
        return chosen(), [call.pattern for call in stand_in.calls], off(module, x, found)


def off(module: Block, x: Tensor, found: Tensor) -> float:
    """The largest error, by the module in float64."""
    with torch.no_grad():
        exact = module.double()(x.double())
        module.float()
    return float((found.double() - exact).abs().max())


Ran = tuple[list[str | None], list[list[tuple[int, bool]]], float, int]
"""Strategies; of each size, how many rows each call took and whether one-shot; the worst answer; how many graphs."""


def of_any_size(sizes: list[int], config: FusionConfig = CONFIG) -> Ran:
    """A graph of any number of tokens, on several sizes."""
    counters.clear()
    module, _ = block(0, 1)
    run = compiled(module, config)
    ran, worst = [], 0.0
    with torch.no_grad():
        for size in sizes:
            x = block(size, size)[1]
            torch._dynamo.mark_dynamic(x, 0)
            run(x)
            stand_in.calls.clear()
            worst = max(worst, off(module, x, run(x)))
            ran.append([(call.tokens, call.one_shot) for call in stand_in.calls])
    return chosen(), ran, worst, counters["stats"]["unique_graphs"]


def crossing(sizes: list[int], one_shot: int, most: int) -> Ran:
    """`of_any_size`, on sizes around those up to which each form is faster."""
    fresh()
    row = HIDDEN * 4
    with faster(one_shot * row, most * row, H100.arch, dist.get_world_size()):
        return of_any_size(sizes)


def forced(sizes: list[int], most: int, two_shot: bool) -> Ran:
    """`of_any_size` by one form alone, of which a launch takes so many rows."""
    fresh(most * HIDDEN * 4)
    with only(two_shot=two_shot):
        return of_any_size(sizes)


def started() -> tuple[str, list[str | None], int, int, float]:
    """A first call in a fresh process: origin of the graph, workspaces before and after, distance."""
    assert not stand_in.alive
    module, x = block(0, 5)
    with torch.no_grad():
        run = compiled(module)
        found = run(x)
    report = fusion_core.last_report()
    assert report is not None
    assert stand_in.calls
    return (
        report.origin,
        chosen(),
        counters["inductor"]["fxgraph_cache_hit"],
        len(stand_in.alive),
        off(module, x, found),
    )


def failing(rank: int) -> tuple[str, str, float]:
    """The report before and after a first call whose workspace one rank cannot make."""
    fresh()
    stand_in.fails_to_create.add(rank)
    try:
        module, x = block(0, 5)
        with torch.no_grad():
            found = compiled(module)(x)
        report = fusion_core.last_report()
        assert report is not None
        assert not stand_in.calls
        (state,) = [status.state for status in WORKSPACES.status()]
        return str(report), state, off(module, x, found)
    finally:
        stand_in.fails_to_create.clear()


def capacity(max_tokens: int, sizes: list[int]) -> tuple[list[bool], int, float]:
    """For each number of tokens whether it was fused; the workspace's capacity."""
    fresh()
    _, ran, worst, _ = of_any_size(sizes, replace(CONFIG, max_tokens=max_tokens))
    return [bool(calls) for calls in ran], elements() // 2, worst  # of 32 bits


def refused(tokens: int, most: int) -> tuple[list[str | None], str]:
    """A function whose token count is fixed and above the limit: decided when it is compiled."""
    fresh()
    x = torch.zeros(tokens, HIDDEN)
    limit = most * HIDDEN * 4
    with torch.no_grad(), faster(limit, limit, H100.arch, dist.get_world_size()):
        compiled(lambda x: all_reduce(x, "sum", dist.group.WORLD))(x)
    assert not stand_in.calls
    return chosen(), str(fusion_core.last_report())
