"""One of FlashInfer's kernels on the box at hand, before its first use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core import Reason
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.workspaces.self_check import EPS, distance, farthest_off
from fusion_flashinfer.fused import fused
from fusion_flashinfer.held import Ready
from fusion_flashinfer.kernels import Buffers, Kernel, allocate

SCALE = 1 / 64
OPTIONS: dict[str, dict[str, Any]] = {"group_fp8": {"group_size": 128}, "nvfp4": {"scale_layout": "linear"}}
PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}


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
    options = OPTIONS.get(kernel.quantization, {})
    option = next(iter(options.values()), None)

    def run(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        buffers = allocate(kernel, given["x"], **options)
        scale = given.get("scale", given.get("global_scale"))
        fused(
            kernel, ready, buffers, given["x"], given.get("residual"), given.get("weight"), scale, EPS, 0.0, option, pdl
        )
        return results(kernel, buffers)

    scales = {"scale": SCALE, "global_scale": 1 / SCALE}
    pattern = PATTERNS[kernel.pattern]
    try:
        worst = farthest_off(
            pattern, run, (tokens, hidden), dtype, device, group, ready.handle.rank, **scales, **_scalars(kernel)
        )
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


def results(kernel: Kernel, buffers: Buffers) -> dict[str, Tensor]:
    """What a call wrote, by the pattern's names."""
    found = {
        "quantized": buffers.quantized,
        "scale": buffers.scale,
        "normed": buffers.normed,
        kernel.outputs[-1]: buffers.total,
    }
    return {name: tensor for name, tensor in found.items() if name in kernel.outputs and tensor is not None}


def _scalars(kernel: Kernel) -> dict[str, Any]:
    packed = {"scale_format": "ue8m0_packed"} if kernel.quantization == "group_fp8" else {}
    return OPTIONS.get(kernel.quantization, {}) | packed


def distance_of(kernel: Kernel, buffers: Buffers, exact: Mapping[str, Tensor], scale: Tensor | None) -> float:
    """How far one call's results are from float64, in units of what its dtypes allow."""
    arguments = {**_scalars(kernel), "scale": scale, "global_scale": scale}
    return distance(PATTERNS[kernel.pattern], results(kernel, buffers), exact, arguments)
