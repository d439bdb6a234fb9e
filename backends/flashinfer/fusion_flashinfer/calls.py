"""The call of a fused kernel, by FlashInfer's public function or by the function below it.

The public function repeats checks that were made here when a call's form was first seen, flattens its tensors and
warns: some 15 us of CPU time per site of an eager model. If the function below it has the parameters of 0.7.2, that one
is called; both run the same kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

PARAMETERS = (
    "allreduce_in",
    "world_size",
    "world_rank",
    "token_num",
    "hidden_dim",
    "workspace_ptrs",
    "launch_with_pdl",
    "use_oneshot",
    "trigger_completion_at_end",
    "fp32_acc",
    "pattern_code",
    "allreduce_out",
    "residual_in",
    "residual_out",
    "norm_out",
    "quant_out",
    "scale_out",
    "rms_gamma",
    "rms_eps",
    "scale_factor",
    "layout_code",
    "block_quant_group_size",
    "weight_bias",
)
"""Parameters of ``flashinfer.comm.trtllm_ar.get_trtllm_comm_module().trtllm_allreduce_fusion`` in 0.7.2."""

Call = Callable[..., None]
"""(code, one_shot, pdl, x, total, residual, normed, quantized, scale_out, weight, eps, weight_bias, scale, layout,
group_size), each as FlashInfer takes it; ``total`` is the sum without a norm or the new residual with one."""


def call_for(handle: Any, public: Callable[..., Any], below: Callable[..., Any] | None) -> Call:
    """The function that calls kernels on a workspace.

    Args:
        handle: FlashInfer's workspace.
        public: ``flashinfer.comm.allreduce_fusion``.
        below: The function that it calls for a ``trtllm`` workspace; None if it was not found.
    """
    if below is not None and handle.backend == "trtllm" and tuple(inspect.signature(below).parameters) == PARAMETERS:
        return _below(handle, below)
    return _public(handle, public)


def _below(handle: Any, function: Callable[..., Any]) -> Call:
    size, rank, pointers = handle.world_size, handle.rank, handle.workspace_tensor

    def call(
        code: int,
        one_shot: bool | None,
        pdl: bool,
        x: Tensor,
        total: Tensor,
        residual: Tensor | None,
        normed: Tensor | None,
        quantized: Tensor | None,
        scale_out: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_bias: float,
        scale: Tensor | None,
        layout: int | None,
        group_size: int | None,
    ) -> None:
        tokens, hidden = x.shape
        # fp32_acc: sums in the input's dtype lost accuracy for users (sglang#34603, TensorRT-LLM#16753).
        # trigger_completion_at_end: the next kernel may read too early otherwise (vLLM#45448).
        function(
            x, size, rank, tokens, hidden, pointers, pdl, one_shot, True, True, code, total, residual, total, normed,
            quantized, scale_out, weight, eps, scale, layout, group_size, weight_bias,
        )  # fmt: skip

    return call


def _public(handle: Any, function: Callable[..., Any]) -> Call:
    def call(
        code: int,
        one_shot: bool | None,
        pdl: bool,
        x: Tensor,
        total: Tensor,
        residual: Tensor | None,
        normed: Tensor | None,
        quantized: Tensor | None,
        scale_out: Tensor | None,
        weight: Tensor | None,
        eps: float,
        weight_bias: float,
        scale: Tensor | None,
        layout: int | None,
        group_size: int | None,
    ) -> None:
        function(
            input=x,
            workspace=handle,
            pattern=code,
            launch_with_pdl=pdl,
            trigger_completion_at_end=True,
            output=total,  # not written by a pattern with a norm, but allocated if it is missing
            residual_out=total if code else None,
            norm_out=normed,
            quant_out=quantized,
            scale_out=scale_out,
            residual_in=residual,
            rms_gamma=weight,
            rms_eps=eps,
            scale_factor=scale,
            layout_code=layout,
            use_oneshot=one_shot,
            fp32_acc=True,
            block_quant_group_size=group_size,
            weight_bias=weight_bias,
        )

    return call
