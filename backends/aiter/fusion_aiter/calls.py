"""Calls of AITER's methods by keyword, with unregistered inputs, and their results by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusion_aiter.kernels import Form, Kernel


def call(
    kernel: Kernel,
    communicator: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    weight_bias: float,
    form: Form,
    *,
    one_stage: bool,
) -> dict[str, Tensor] | None:
    """Run a kernel. Returns None if AITER returns None, which it does on all ranks or on none.

    AITER copies inputs into its own memory (``registered=False``), both eagerly and in a capture. Its other way, which
    reads a graph's own tensors, is the subject of most reports of wrong graphs (aiter#2638, #3838, #4974,
    sglang#36071). That way also needs AITER's ``capture()``, in which calls outside of a capture return zeros.

    Args:
        kernel: The kernel.
        communicator: AITER's ``CustomAllreduce``.
        x: ``[tokens, n]``, not empty. It and the other tensors are contiguous and aligned to 16 bytes.
        residual: Of x's shape and dtype; zeros for a pattern without a residual.
        weight: ``[n]`` of x's dtype.
        eps: Added to the mean of squares.
        weight_bias: 0 or 1.
        form: The format of the quantisation.
        one_stage: Whether to run the one-stage kernel.

    Returns:
        `Kernel.outputs` by name.
    """
    if not kernel.norms:
        found = communicator.all_reduce(inp=x, use_new=True, open_fp8_quant=False, registered_input=False)
        return None if found is None else {kernel.outputs[0]: found}
    common = {"inp": x, "res_inp": residual, "w": weight, "eps": eps, "registered": False, "use_1stage": one_stage}
    gemma = weight_bias == 1.0
    if not kernel.quantization:
        found = communicator.fused_ar_rms(**common, gemma_norm=gemma)
        order: tuple[str, ...] = ("normed", kernel.outputs[-1])
    else:
        if kernel.quantization == "token_fp8":
            found = communicator.fused_ar_rms(
                **common, post_per_token_quant=True, gemma_norm=gemma, emit_bf16=kernel.norm_out
            )
        elif kernel.quantization == "group_fp8":
            found = communicator.fused_ar_rms_per_group_quant(
                **common, group_size=form.group_size, emit_bf16=kernel.norm_out, transpose_scale=form.transposed
            )
        else:
            found = communicator.fused_ar_rms_mxfp4_quant(**common, emit_bf16=kernel.norm_out)
        order = ("quantized", kernel.outputs[-1], "scale", "normed")
    return None if found is None else dict(zip(order, found, strict=False))
