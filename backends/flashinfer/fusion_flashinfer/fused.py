"""One call of FlashInfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusion_core.workspaces import Call, Workspace
from fusion_flashinfer.kernels import Form

LAYOUTS = {"swizzled_128x4": 0, "linear": 2}
"""``QuantizationSFLayout``. Its 8x4 layout is left out: the ``trtllm`` kernels write nothing in it."""


def fused(workspace: Workspace[Any], call: Call, results: Mapping[str, Tensor]) -> None:
    """Call FlashInfer, which writes into ``results``."""
    form: Form = call.kernel  # type: ignore[assignment]
    kernel, tensors, scalars = form.kernel, call.tensors, call.scalars
    x, residual = tensors["x"], tensors.get("residual")
    if kernel.norms and residual is None:
        residual = workspace.zeros(x)
    scale = tensors.get("scale", tensors.get("global_scale"))
    if scale is not None and scale.dim() != 1:
        scale = scale.reshape(1)
    layout = scalars.get("scale_layout")
    workspace.handle.call(
        kernel.code, form.one_shot, form.pdl, x, results[kernel.outputs[-1]], residual, results.get("normed"),
        results.get("quantized"), results.get("scale"), tensors.get("weight"), scalars.get("eps", 0.0),
        scalars.get("weight_bias", 0.0), scale, None if layout is None else LAYOUTS[layout], scalars.get("group_size"),
    )  # fmt: skip
