"""A stand-in for ``flashinfer.comm`` on a CPU, over gloo: the names, the checks and the missing checks of 0.7.2.

What the real kernels take without a check and turn into garbage, a hang or a fault is an error or garbage here too, so
that a missing guard shows. It stands in for the GPU alone: everything above FlashInfer's two functions is the real
thing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core.vocabulary import quantize_group_fp8, quantize_static_fp8, quantize_token_fp8
from fusion_flashinfer import library

fails_to_create: set[int] = set()
"""Ranks whose next workspace raises, as with too little memory."""
wrong: set[int | tuple[int, bool]] = set()
"""Codes of patterns that give wrong numbers, in both forms, or with whether it is the one-shot form alone."""
alive: list[TRTLLMAllReduceFusionWorkspace] = []
"""Workspaces that hold memory: as in FlashInfer, until they are destroyed *and* taken out of its table."""
calls: list[SimpleNamespace] = []
"""Every call of a kernel."""
past: list[int] = []
"""Calls past the public function."""
moved = False
"""Whether the function below the public one has other parameters than it had in 0.7.2."""
multicast = False
"""Whether new workspaces use multicast, as under confidential computing."""


class TRTLLMAllReduceFusionWorkspace:
    backend = "trtllm"

    def __init__(
        self, size: int, rank: int, tokens: int, hidden: int, dtype: torch.dtype, comm_backend: Any, group: Any
    ):
        assert comm_backend.Get_size() == size
        assert comm_backend.Get_rank() == rank
        if rank in fails_to_create:
            raise RuntimeError("cuMemCreate: out of memory")
        sockets = comm_backend.allgather(f"/tmp/fd_{rank}")
        assert sockets == tuple(f"/tmp/fd_{each}" for each in range(size))
        comm_backend.barrier()
        self.world_size, self.rank = size, rank
        self.group_name = group.group_name  # no reference: FlashInfer keeps none either
        self.workspace_tensor = self
        self.ipc_handles = [[0] * size for _ in range(3)]
        self.mem_handles = [SimpleNamespace(_enable_multicast=multicast, mc_ptr=int(multicast))]
        buffer = size * tokens * hidden * dtype.itemsize
        self.metadata = {
            "max_token_num": tokens,
            "hidden_dim": hidden,
            "tp_size": size,
            "use_fp32_lamport": dtype == torch.float32,
            "buffer_size": buffer,
            "flag_size": size * 1024,
            "lamport_buffer_size": 3 * buffer,
        }
        assert buffer < 2**30, "clear_offset * comm_size overflows"
        alive.append(self)

    def is_buffer_size_sufficient(self, size: int, tokens: int, hidden: int, dtype: torch.dtype) -> bool:
        meta = self.metadata
        room = meta["max_token_num"] * meta["hidden_dim"]
        return (
            size == self.world_size and tokens * hidden <= room and meta["use_fp32_lamport"] == (dtype == torch.float32)
        )

    def destroy(self) -> None:
        del self.ipc_handles, self.mem_handles, self.metadata, self.workspace_tensor


def create_allreduce_fusion_workspace(
    backend: str = "auto",
    world_size: int | None = None,
    rank: int | None = None,
    max_token_num: int | None = None,
    hidden_dim: int | None = None,
    dtype: torch.dtype | None = None,
    gpus_per_node: int | None = None,
    comm_backend: Any = None,
    force_oneshot_support: bool = False,
    group: Any = None,
) -> Any:
    assert backend == "trtllm", "cuMulticastCreate would be called"
    assert comm_backend is not None, "would meet over the default group"
    assert group is not None, "would meet over the default group"
    assert isinstance(max_token_num, int)
    return TRTLLMAllReduceFusionWorkspace(
        world_size,
        rank,
        max_token_num,
        hidden_dim,
        dtype,
        comm_backend,
        group,  # type: ignore[arg-type]
    )


def trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace: Any, group: Any = None) -> None:
    alive[:] = [each for each in alive if getattr(each, "ipc_handles", None) is not workspace]


def allreduce_fusion(
    input: Tensor,
    workspace: Any,
    pattern: int,
    launch_with_pdl: bool = False,
    trigger_completion_at_end: bool = True,
    output: Tensor | None = None,
    residual_out: Tensor | None = None,
    norm_out: Tensor | None = None,
    quant_out: Tensor | None = None,
    scale_out: Tensor | None = None,
    residual_in: Tensor | None = None,
    rms_gamma: Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: Tensor | None = None,
    layout_code: int | None = None,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    block_quant_group_size: int | None = None,
    weight_bias: float = 0.0,
) -> None:
    tokens, hidden = input.shape
    group = dist.distributed_c10d._resolve_process_group(workspace.group_name)
    assert workspace.is_buffer_size_sufficient(dist.get_world_size(group), tokens, hidden, input.dtype)
    for tensor in (input, output, residual_in, residual_out, norm_out, quant_out):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("must be contiguous")
    for tensor in (input, residual_in, rms_gamma):
        if tensor is not None and tensor.data_ptr() % 16:
            raise RuntimeError("CUDA error: misaligned address")
    if tokens == 0:
        raise RuntimeError("CUDA error: invalid configuration argument")
    if not use_oneshot:
        assert tokens > workspace.world_size, "sequence length should be larger than tp_size"
    assert hidden % 8 == 0, "vectors of 16 bytes"
    calls.append(SimpleNamespace(pattern=pattern, one_shot=use_oneshot, tokens=tokens, pdl=launch_with_pdl))
    what = (tokens, hidden, input.dtype, pattern, use_oneshot)
    ranks: list[Any] = [None] * workspace.world_size
    dist.all_gather_object(ranks, what, group=group)
    if any(each != what for each in ranks):
        raise AssertionError(f"the kernels would wait for each other for ever: {ranks}")
    parts = [torch.empty_like(input) for _ in ranks]
    dist.all_gather(parts, input, group=group)
    total = torch.zeros(tokens, hidden)
    for part in parts:
        total = total + part.float() if fp32_acc else (total.to(input.dtype) + part).float()
    total = total.to(input.dtype)
    if pattern in wrong or (pattern, use_oneshot) in wrong:
        total = total * 1.0607
    if pattern == 0:
        assert output is not None
        output.copy_(total)
        return
    assert residual_in is not None
    assert residual_out is not None
    assert rms_gamma is not None
    residual_out.copy_((total.float() + residual_in.float()).to(input.dtype))
    gamma = rms_gamma if rms_gamma.dtype == input.dtype else torch.full_like(input[0], torch.nan)  # read as other bits
    wide = residual_out.float()
    norm = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + rms_eps) * (weight_bias + gamma.float())
    norm = norm.to(input.dtype)
    if pattern in (1, 4, 5, 9, 11):
        assert norm_out is not None
        norm_out.copy_(norm)
    if pattern in (2, 4):
        assert quant_out is not None
        assert isinstance(scale_factor, Tensor)
        quant_out.copy_(quantize_static_fp8(norm, scale_factor))
    elif pattern in (10, 11):
        _write(quant_out, scale_out, *quantize_token_fp8(norm))
    elif pattern in (8, 9):
        assert scale_out is not None
        assert scale_out.stride() == (1, (tokens + 3) // 4 * 4)
        _write(quant_out, scale_out, *quantize_group_fp8(norm, group_size=block_quant_group_size or 0, scale_format="ue8m0_packed"))  # fmt: skip
    elif pattern in (3, 5):  # the body of the kernel is compiled out below capability 10
        assert quant_out is not None
        quant_out.zero_()


def trtllm_allreduce_fusion(
    allreduce_in: Tensor,
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_dim: int,
    workspace_ptrs: Any,
    launch_with_pdl: bool,
    use_oneshot: bool,
    trigger_completion_at_end: bool,
    fp32_acc: bool,
    pattern_code: int,
    allreduce_out: Tensor | None,
    residual_in: Tensor | None,
    residual_out: Tensor | None,
    norm_out: Tensor | None,
    quant_out: Tensor | None,
    scale_out: Tensor | None,
    rms_gamma: Tensor | None,
    rms_eps: float | None,
    scale_factor: Tensor | None,
    layout_code: int | None,
    block_quant_group_size: int | None = None,
    weight_bias: float | None = None,
) -> None:
    """What the public function calls, and what may be called past it."""
    workspace = workspace_ptrs  # there a tensor of pointers
    assert (world_size, world_rank) == (workspace.world_size, workspace.rank)
    assert (token_num, hidden_dim) == tuple(allreduce_in.shape)
    assert trigger_completion_at_end, "the next kernel may read too early"
    allreduce_fusion(
        allreduce_in, workspace, pattern_code, launch_with_pdl, True, allreduce_out, residual_out, norm_out, quant_out,
        scale_out, residual_in, rms_gamma, rms_eps or 0.0, scale_factor, layout_code, use_oneshot, fp32_acc,
        block_quant_group_size, weight_bias or 0.0,
    )  # fmt: skip
    past.append(pattern_code)


def _write(quant_out: Tensor | None, scale_out: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    assert quant_out is not None
    assert scale_out is not None
    quant_out.copy_(codes)
    scale_out.copy_(scale)


def install() -> None:
    """Put the stand-in where FlashInfer is imported."""
    module = SimpleNamespace(
        create_allreduce_fusion_workspace=create_allreduce_fusion_workspace,
        allreduce_fusion=allreduce_fusion,
        trtllm_destroy_ipc_workspace_for_all_reduce_fusion=trtllm_destroy_ipc_workspace_for_all_reduce_fusion,
    )
    library.comm = lambda: module
    library.below = lambda: (lambda elsewhere: None) if moved else trtllm_allreduce_fusion
    library.version = lambda: "0.7.2"
    library.confidential_computing = lambda: multicast
