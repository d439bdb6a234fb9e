"""One of AITER's kernels on the box at hand, before its first use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_aiter.calls import call
from fusion_aiter.held import Held
from fusion_aiter.kernels import Form, Kernel
from fusion_core import Reason
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.workspaces.self_check import EPS, farthest_off

PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
GROUP_SIZES = (128, 64, 32, 16, 8)


def self_check(
    kernel: Kernel, held: Held, shape: tuple[int, int], dtype: torch.dtype, *, one_stage: bool
) -> Reason | None:
    """Why a kernel is not used here, or None. Every rank of the group calls it; allocates, so not in a capture."""
    # rows of four float32 have none of these groups, and no kernel that would look at them
    form = Form(group_size=next((size for size in GROUP_SIZES if shape[1] % size == 0), Form.group_size))

    def run(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        x = given["x"]
        residual = given.get("residual", torch.zeros_like(x))
        found = call(kernel, held.communicator, x, residual, given.get("weight"), EPS, 0.0, form, one_stage=one_stage)
        if found is None:
            raise RuntimeError("AITER gave nothing")
        return found

    group = held.group()
    assert group is not None
    scalars = {"group_size": form.group_size} if kernel.quantization == "group_fp8" else {}
    try:
        worst = farthest_off(
            PATTERNS[kernel.pattern], run, shape, dtype, held.device, held.name, group.rank(), **scalars
        )
    except Exception as error:  # noqa: BLE001  # a kernel fails in any way; the model must go on without it
        return Reason("self_check", f"the self-check of {kernel.name} raised {type(error).__name__}: {error}")
    if worst <= 1:
        return None
    stages = "one stage" if one_stage else "two stages"
    return Reason(
        "self_check",
        f"AITER's {kernel.method} in {stages} gave results {worst:.3g} times as far from float64 as its dtypes allow "
        "on this machine",
        "a kernel that is right",
        hint="report it to ROCm/aiter with `fusion-core verify aiter --json`",
    )
