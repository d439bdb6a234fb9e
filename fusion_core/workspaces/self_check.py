"""One kernel against its pattern's definition on the machine at hand, before its first use.

Kernels that were wrong on one machine only (flashinfer#3879, sglang#19884, vLLM#45448, aiter#4888) were found by users.
A backend that asks here finds them when its memory is made, and does not use them. The bounds tell a wrong kernel from
a right one, not a good one from a better one: that is the conformance kit's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.vocabulary.fp4 import dequantize_mxfp4, dequantize_nvfp4
from fusion_core.vocabulary.fp8 import dequantize_fp8
from fusion_core.workspaces.per_group import synchronize

ROUNDS = 3
"""Calls in a row: a stale flag or a stale residual shows in the second or third."""

EPS = 1e-5
ROUNDINGS = 4
"""How many times the dtype's eps a result may be off, as a part of its row's largest value."""

CODE_STEPS = {
    "quantize_static_fp8": 2**-3,
    "quantize_token_fp8": 2**-3,
    "quantize_group_fp8": 2**-2,
    "quantize_nvfp4": 0.5,
    "quantize_mxfp4": 0.5,
}
"""How far codes may be off, as a part of the row's largest value: one step of the code, two with a rounded scale."""

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From the pattern's tensors by name to outputs by name, without waiting for the device."""


def farthest_off(
    pattern: Pattern,
    run: Run,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    group: str,
    rank: int,
    **scalars: Any,
) -> float:
    """How far a kernel is from float64, in units of what its dtypes allow: up to 1 is right.

    Every rank of the group calls it. It allocates, so it cannot be called in a capture.

    Args:
        pattern: What the kernel computes.
        run: One call of it; ``eps`` is `EPS` and ``weight_bias`` 0.
        shape: Tokens and hidden size.
        dtype: Of x, the residual and the weight.
        device: Where to run it.
        group: The process group's name.
        rank: This rank in it.
        **scalars: Of the pattern, where they are not its defaults; those named like a tensor of it are its value.
    """
    synchronize(device)  # a call on another stream may still use the memory that this one will
    own, common = torch.Generator(device).manual_seed(rank), torch.Generator(device).manual_seed(99)
    with torch.no_grad():
        calls: list[dict[str, Tensor]] = []
        for _ in range(ROUNDS):
            tensors = {"x": torch.randn(shape, generator=own, device=device, dtype=dtype)}
            if "residual" in pattern.tensors:
                tensors["residual"] = torch.randn(shape, generator=common, device=device, dtype=dtype)
            if "weight" in pattern.tensors:
                tensors["weight"] = torch.rand(shape[1], generator=common, device=device, dtype=dtype) + 0.5
            for name in ("scale", "global_scale"):
                if name in pattern.tensors:
                    tensors[name] = torch.full((1,), scalars[name], device=device)
            calls.append(tensors)
        found = [run(tensors) for tensors in calls]  # back to back, as in a model
        given = {name: value for name, value in scalars.items() if name in pattern.scalars}
        if "eps" in pattern.scalars:
            given["eps"] = EPS
        worst = 0.0
        for tensors, results in zip(calls, found, strict=True):
            exact = exactly(pattern, tensors, given, group)
            worst = max(worst, distance(pattern, results, exact, {**tensors, **given}))
    return worst


def exactly(pattern: Pattern, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The pattern's outputs in float64, by name."""
    wide = {name: value if "scale" in name else value.double() for name, value in tensors.items()}
    returned = pattern.function(**wide, **scalars, **{GROUP: group})
    return dict(zip(pattern.outputs, returned if isinstance(returned, tuple) else (returned,), strict=True))


def distance(
    pattern: Pattern, results: Mapping[str, Tensor], exact: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> float:
    """The largest error of any output in units of what is allowed; infinite where a result is not finite.

    Args:
        pattern: What was computed.
        results: Outputs by name; codes need their scales beside them. Scales are judged with their codes.
        exact: Outputs in float64, ``normed`` among them where there are codes.
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
