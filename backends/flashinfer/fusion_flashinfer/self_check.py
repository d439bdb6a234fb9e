"""One kernel against the pattern's definition on the box at hand, before its first use.

Kernels that were wrong on one machine only (flashinfer#3879, sglang#19884, vLLM#45448) were found by users. Here they
are found when the workspace is made, and are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusion_core import Reason
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary.fp4 import dequantize_nvfp4
from fusion_core.vocabulary.fp8 import dequantize_fp8
from fusion_flashinfer.kernels import Kernel, allocate

if TYPE_CHECKING:
    from fusion_flashinfer.held import Ready

EPS = 1e-5
SCALE = 1 / 64
ROUNDS = 3
"""Calls in a row: a stale flag or a stale residual shows in the second or third."""

CODE_STEPS = {"static_fp8": 2**-3, "token_fp8": 2**-3, "group_fp8": 2**-2, "nvfp4": 0.5}
"""How far codes may be off, as a part of the row's largest value: one step of the code, two with a rounded scale."""


def self_check(
    kernel: Kernel,
    ready: Ready,
    tokens: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    group: str,
    *,
    pdl: bool,
) -> Reason | None:
    """Why a kernel is not used here, or None. Every rank of the group calls it; allocates, so not in a capture."""
    from fusion_flashinfer.launch import fused

    pattern = next(each for each in CORE_PATTERNS if each.name == kernel.pattern)
    generator = torch.Generator(device).manual_seed(ready.handle.rank)
    common = torch.Generator(device).manual_seed(99)
    worst = 0.0
    try:
        with torch.no_grad():
            given: list[tuple[Tensor, Tensor | None, Tensor]] = []
            for _ in range(ROUNDS):
                x = torch.randn(tokens, hidden, generator=generator, device=device, dtype=dtype)
                common_part = torch.randn(tokens, hidden, generator=common, device=device, dtype=dtype)
                weight = torch.rand(hidden, generator=common, device=device, dtype=dtype) + 0.5
                given.append((x, common_part if kernel.adds else None, weight))
            scale = torch.full((1,), 1 / SCALE if kernel.quantization == "nvfp4" else SCALE, device=device)
            options: dict[str, Any] = {}
            if kernel.quantization == "group_fp8":
                options = {"group_size": 128}
            elif kernel.quantization == "nvfp4":
                options = {"scale_layout": "linear"}
            option = next(iter(options.values()), None)
            buffers = []
            for x, residual, weight in given:  # back to back, as in a model
                buffers.append(allocate(kernel, x, **options))
                fused(kernel, ready, buffers[-1], x, residual, weight, scale, EPS, 0.0, option, pdl)
            for (x, residual, weight), found in zip(given, buffers, strict=True):
                arguments: dict[str, Any] = {"x": x.double(), "group": group}
                if kernel.norms:
                    arguments |= {"weight": weight.double(), "eps": EPS}
                if residual is not None:
                    arguments["residual"] = residual.double()
                if kernel.quantization == "static_fp8":
                    arguments["scale"] = scale
                elif kernel.quantization == "nvfp4":
                    arguments |= {"global_scale": scale, "scale_layout": "linear"}
                exact = pattern.function(**arguments)
                names = pattern.outputs
                results = dict(zip(names, exact if isinstance(exact, tuple) else (exact,), strict=True))
                worst = max(worst, _distance(kernel, found, results, scale))
    except Exception as error:  # noqa: BLE001  # a kernel fails in any way; the model must go on without it
        return Reason("self_check", f"the self-check of {kernel.name} raised {type(error).__name__}: {error}")
    if worst <= 1:
        return None
    return Reason(
        "self_check",
        f"{kernel.symbol} gave results {worst:.3g} times as far from float64 as its dtypes allow on this machine",
        "a kernel that is right",
        hint="report it to flashinfer-ai/flashinfer with `fusion-core verify flashinfer --json`",
    )


def _distance(kernel: Kernel, found: Any, exact: Mapping[str, Tensor], scale: Tensor) -> float:
    """The largest error in units of what is allowed; infinite where a result is not finite."""
    total = exact[kernel.outputs[-1]]
    parts = [_units(found.total, total, 4 * torch.finfo(found.total.dtype).eps)]
    if kernel.norms and found.normed is not None:
        parts.append(_units(found.normed, exact["normed"], 4 * torch.finfo(found.normed.dtype).eps))
    if kernel.quantization:
        codes = found.quantized
        if kernel.quantization == "static_fp8":
            values = dequantize_fp8(codes, scale)
        elif kernel.quantization == "nvfp4":
            values = dequantize_nvfp4(codes, found.scale, scale, scale_layout="linear")
        else:
            values = dequantize_fp8(codes, found.scale, group_size=128 if kernel.quantization == "group_fp8" else None)
        parts.append(_units(values, exact["normed"], CODE_STEPS[kernel.quantization]))
    return max(parts)


def _units(found: Tensor, exact: Tensor, allowed: float) -> float:
    error = (found.double() - exact).abs().nan_to_num(torch.inf, torch.inf).amax(-1)
    return float((error / (allowed * exact.abs().amax(-1))).max())
