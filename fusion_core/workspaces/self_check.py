"""A check of one kernel against its pattern's definition, on this machine and before its first use.

Kernels that were wrong on some machines only (flashinfer#3879, sglang#19884, vLLM#45448, aiter#4888) were found by
users. This check finds them when a workspace is made, and they are not used. Its bounds only separate wrong kernels
from correct ones; the conformance kit has the tight ones.

It runs no collective but the kernel. A rank whose kernel fails goes on without it at once, and its next collective is
the model's; one of the check's on the other ranks would be paired with that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core._cuda import synchronize
from fusion_core.patterns.definition import VECTORS, Pattern
from fusion_core.reason import Reason
from fusion_core.vocabulary.fp4 import dequantize_mxfp4, dequantize_nvfp4
from fusion_core.vocabulary.fp8 import dequantize_fp8
from fusion_core.workspaces.call import Call, Handle, Workspace
from fusion_core.workspaces.provider import Provider

ROUNDS = 3
"""Calls in a row: a stale flag or a stale residual shows in the second or third."""

WIDE = torch.float64
EPS = 1e-5
SCALE = 1 / 64
"""The scale of a static quantisation."""
ROUNDINGS = 4
"""The allowed error, in units of the dtype's eps times the row's largest value."""

CODE_STEPS = {
    "quantize_static_fp8": 2**-3,
    "quantize_token_fp8": 2**-3,
    "quantize_group_fp8": 2**-2,
    "quantize_nvfp4": 0.5,
    "quantize_mxfp4": 0.5,
}
"""The allowed error of codes, relative to the row's largest value: one step of the code, two with a rounded scale."""

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A function from the pattern's tensors by name to outputs by name. It does not wait for the device."""


def farthest_off(
    pattern: Pattern,
    run: Run,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    world_size: int,
    **scalars: Any,
) -> float:
    """The largest error of a kernel against float64, in units of what its dtypes allow; up to 1 is correct.

    Every rank of the group calls it. It allocates, so it cannot be called in a capture.

    Args:
        pattern: The pattern that the kernel computes.
        run: Runs it once; ``eps`` is `EPS` and ``weight_bias`` 0.
        shape: Tokens and hidden size.
        dtype: The dtype of x, the residual, the weight and the bias.
        device: The device to run it on.
        rank: This rank in the group.
        world_size: The number of ranks in the group.
        **scalars: The pattern's scalars that differ from its defaults. One with a tensor's name is the tensor's value.
    """
    synchronize(device)  # a call on another stream may still use the memory that this one will
    seeds = [torch.Generator(device).manual_seed(each) for each in range(world_size)]
    common = torch.Generator(device).manual_seed(99)
    with torch.no_grad():
        calls: list[dict[str, Tensor]] = []
        sums: list[Tensor] = []
        for _ in range(ROUNDS):
            parts = [torch.randn(shape, generator=seed, device=device, dtype=dtype) for seed in seeds]
            tensors = {"x": parts[rank]}
            sums.append(functools.reduce(torch.Tensor.add_, parts, torch.zeros(shape, device=device, dtype=WIDE)))
            if "residual" in pattern.tensors:
                tensors["residual"] = torch.randn(shape, generator=common, device=device, dtype=dtype)
            for name in (each for each in VECTORS if each in pattern.tensors):
                tensors[name] = torch.rand(shape[1], generator=common, device=device, dtype=dtype) + 0.5
            for name in ("scale", "global_scale"):
                if name in pattern.tensors:
                    tensors[name] = torch.full((1,), scalars[name], device=device)
            calls.append(tensors)
        found = [run(tensors) for tensors in calls]  # back to back, as in a model
        given = {name: value for name, value in scalars.items() if name in pattern.scalars}
        if "eps" in pattern.scalars:
            given["eps"] = EPS
        worst = 0.0
        for tensors, reduced, results in zip(calls, sums, found, strict=True):
            exact = exactly(pattern, reduced, tensors, given)
            worst = max(worst, distance(pattern, results, exact, {**tensors, **given}))
    return worst


def why_not_used(
    provider: Provider[Handle], workspace: Workspace[Handle], call: Call, device: torch.device
) -> Reason | None:
    """The reason why a call's kernel is not used on this machine, or None. Every rank of the group calls it.

    Args:
        provider: Calls the kernel.
        workspace: The workspace that it runs on.
        call: A call of the kernel; its tensors are not used.
        device: The device to run it on.

    Raises:
        Exception: any that the kernel's call raises.
    """
    scalars = dict(call.scalars)
    scalars |= {name: value for name, value in {"eps": EPS, "weight_bias": 0.0}.items() if name in scalars}

    def run(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = provider.run(workspace, call.of(tensors, scalars))
        if found is None:
            raise RuntimeError("the kernel gave nothing")
        return found

    worst = farthest_off(
        call.pattern, run, provider.check_shape(call), call.x.dtype, device, call.process_group.rank(),
        call.process_group.size(), **{"scale": SCALE, "global_scale": 1 / SCALE} | scalars,
    )  # fmt: skip
    if worst <= 1:
        return None
    kernel = f" ({call.kernel})" if call.kernel is not None else ""
    return Reason(
        "self_check",
        f"{call.strategy}{kernel} gave results {worst:.3g} times as far from float64 as its dtypes allow on this "
        "machine",
        "a kernel that is right",
        hint=f"report it to {provider.report_to} with `fusion-core verify {provider.name} --json`",
    )


def exactly(
    pattern: Pattern, reduced: Tensor, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The pattern's outputs in float64, by name.

    Args:
        pattern: The pattern.
        reduced: The sum of all ranks' x in float64.
        tensors: The pattern's tensors by name; x is not used.
        scalars: The pattern's scalars that differ from its defaults.
    """
    from fusion_core.dispatch.bound_pattern import (
        BoundPattern,
    )  # imported here: it brings Dynamo, and a load needs none

    wide = {name: value if "scale" in name else value.double() for name, value in tensors.items() if name != "x"}
    names = tuple(name for name in pattern.tensors if name in wide)
    rest = BoundPattern(pattern, pattern.outputs, names, scalars, group="").rest
    return dict(zip(pattern.outputs, rest(reduced, *map(wide.__getitem__, names)), strict=True))


def distance(
    pattern: Pattern, results: Mapping[str, Tensor], exact: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> float:
    """The largest error of any output, in units of what is allowed; infinite if a result is not finite.

    Args:
        pattern: The pattern that was computed.
        results: Outputs by name, codes together with their scales. Scales are checked as part of their codes.
        exact: Outputs in float64, including ``normed`` if there are codes.
        arguments: The pattern's tensors and scalars.
    """
    worst = 0.0
    for name, result in results.items():
        if name == "scale":
            continue
        if name == "quantized":
            word = next(step.operation.name for step in pattern.steps if step.operation.name.startswith("quantize_"))
            worst = max(
                worst, _units(_dequantized(word, result, results, arguments), exact["normed"], CODE_STEPS[word])
            )
        else:
            worst = max(worst, _units(result, exact[name], ROUNDINGS * torch.finfo(result.dtype).eps))
    return worst


def _dequantized(word: str, codes: Tensor, results: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Tensor:
    if word == "quantize_mxfp4":
        return dequantize_mxfp4(codes, results["scale"])
    if word == "quantize_nvfp4":
        layout = arguments.get("scale_layout", "swizzled_128x4")
        return dequantize_nvfp4(codes, results["scale"], arguments["global_scale"], scale_layout=layout)
    if word == "quantize_static_fp8":
        return dequantize_fp8(codes, arguments["scale"])
    group_size = arguments.get("group_size", 128) if word == "quantize_group_fp8" else None
    return dequantize_fp8(codes, results["scale"], group_size=group_size)


def _units(found: Tensor, exact: Tensor, allowed: float) -> float:
    error = (found.double() - exact).abs().nan_to_num(torch.inf, torch.inf).amax(-1)
    return float((error / (allowed * exact.abs().amax(-1))).max())
