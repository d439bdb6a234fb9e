"""`CustomAllreduce`: AITER's communicator, with the methods that a backend needs.

Left out: all-gather, reduce-scatter, query-key norm, registering buffers by hand, and the lossy all-reduce of
``open_fp8_quant``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from aiter import _outputs
from aiter._calling import run_all_reduce, run_fused
from aiter._exchange import FOR_EVER, meet
from aiter._gates import check_group_size, check_mxfp4_width, is_weak_contiguous, max_custom_size, min_custom_size
from aiter._outputs import EMPTY, ZEROS
from aiter._pool import IPCBuffer, stream_is_capturing
from aiter._record import recorded


def _should_use_vmm(is_gfx1250: bool) -> bool:
    return is_gfx1250


def _expandable_segments_enabled() -> bool:
    """Whether torch's allocator has expandable segments, whose addresses cannot be exported; by the environment."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if given := os.environ.get(name, "").strip():
            return any(field.replace(" ", "").lower() == "expandable_segments:true" for field in given.split(","))
    return False


class IPCBufferPool:
    """The buffers of one communicator, exchanged through the default group's store.

    The key that ranks exchange under holds how many pools this process made before, in any group.
    """

    _pool_seq: int = 0

    def __init__(self, device: torch.device, group: ProcessGroup) -> None:
        self._assert_pure_tcp_store(dist.distributed_c10d._get_default_store())
        mine = IPCBufferPool._pool_seq
        IPCBufferPool._pool_seq += 1
        made = meet(group, mine)
        assert len(set(made)) == 1, f"{FOR_EVER} in TCPStore.get: the ranks made {made} communicators before"
        self._buffers: dict[str, IPCBuffer] = {}

    @staticmethod
    def _assert_pure_tcp_store(store: Any) -> None:
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        assert isinstance(store, dist.TCPStore), (
            f"IPC metadata exchange requires a pure-TCP KV store (TCPStore), got {type(store).__name__}"
        )

    def create(self, key: str, size: int) -> IPCBuffer:
        self._buffers[key] = IPCBuffer(id(self), size)
        return self._buffers[key]

    def __getitem__(self, key: str) -> IPCBuffer:
        return self._buffers[key]

    def __contains__(self, key: str) -> bool:
        return key in self._buffers


class CustomAllreduce:
    """AITER's kernels over the ranks of one group."""

    _SUPPORTED_WORLD_SIZES: ClassVar[list[int]] = [2, 4, 6, 8]
    _depth = 0  # how deep methods call one another, for `recorded`

    @recorded
    def __init__(
        self,
        group: ProcessGroup,
        device: int | str | torch.device,
        max_size=1024 * 1024 * 1024,
        enable_register_for_capturing: bool = True,
    ) -> None:
        self._IS_CAPTURING = False
        self.disabled = True
        self.group = group
        assert dist.get_backend(group) != dist.Backend.NCCL, "CustomAllreduce should be attached to a non-NCCL group."
        if (world_size := dist.get_world_size(group)) not in self._SUPPORTED_WORLD_SIZES:
            return  # without what follows
        if isinstance(device, int):
            device = torch.device(f"cuda:{device}")
        elif isinstance(device, str):
            device = torch.device(device)
        assert isinstance(device, torch.device)
        self.device = device
        self.disabled = False
        self.enable_register_for_capturing = enable_register_for_capturing and not _expandable_segments_enabled()
        self.max_size = max_size
        self._car_max_size = max_custom_size(max_size)
        self._car_min_size = min_custom_size()
        self.rank = dist.get_rank(group)
        self.world_size = world_size
        self.fully_connected = True
        self._pool = IPCBufferPool(self.device, self.group)
        self._pool.create("meta", 5504 + 2 * max_size)
        self._pool.create("input", max_size)
        self._ptr = id(self)

    @recorded
    @contextmanager
    def capture(self) -> Iterator[None]:
        try:
            self._IS_CAPTURING = True
            yield
        finally:
            self._IS_CAPTURING = False

    @recorded
    def close(self):
        if not self.disabled and getattr(self, "_ptr", 0):
            self._ptr = 0

    @recorded
    def should_custom_ar(self, inp: Tensor, prefill_support: bool = False):
        return self.should_custom_ar_bytes(inp, prefill_support) and is_weak_contiguous(inp)

    @recorded
    def should_custom_ar_bytes(self, inp: Tensor, prefill_support: bool = False):
        size = inp.numel() * inp.element_size()
        if self.disabled or size % 16 or self._car_max_size <= 0 or size <= self._car_min_size:
            return False
        return size <= (min(self._car_max_size, self.max_size / 2) if prefill_support else self._car_max_size)

    @recorded
    def all_reduce(
        self,
        inp: Tensor,
        *,
        out: Tensor | None = None,
        use_new: bool = True,
        open_fp8_quant: bool = False,
        registered_input: bool = False,
    ):
        def allocate() -> Tensor:
            if open_fp8_quant and inp.dtype == torch.float16 and inp.numel() >= 128 * 2048:
                raise NotImplementedError("the model has no all-reduce in FP8")
            it = EMPTY.like(inp) if out is None else out
            assert is_weak_contiguous(it), "output tensor is not weak-contiguous"
            return it

        return run_all_reduce(self, inp, allocate, use_new=use_new, registered=registered_input)

    @recorded
    def custom_all_reduce(self, input: Tensor, use_new: bool = True, open_fp8_quant: bool = False) -> Tensor | None:
        def run(registered: bool) -> Tensor:
            registered = registered and self.enable_register_for_capturing
            return self.all_reduce(
                input, use_new=use_new, open_fp8_quant=open_fp8_quant, registered_input=registered
            )

        return self._gated(self.should_custom_ar(input), partial(torch.zeros_like, input), run)

    @recorded
    def fused_ar_rms(
        self,
        inp: Tensor,
        res_inp: Tensor,
        *,
        res_out: Tensor | None = None,
        out: Tensor | None = None,
        scale_out: Tensor | None = None,
        w: Tensor,
        eps: float,
        registered: bool = False,
        use_1stage: bool = False,
        post_per_token_quant: bool = False,
        out_hidden_dim: int = 0,
        gemma_norm: bool = False,
        emit_bf16: bool = False,
    ):
        if post_per_token_quant:
            kind = "token_fp8"
            allocate = partial(_outputs.token_fp8, EMPTY, inp, w, emit_bf16, out, res_out, scale_out)
        else:
            kind, allocate = "plain", partial(_outputs.plain, EMPTY, inp, w, out_hidden_dim, out, res_out)
        flags = {"registered": registered, "use_1stage": use_1stage, "gemma": gemma_norm}
        return run_fused(self, kind, allocate, inp, res_inp, w, eps=eps, **flags)

    @recorded
    def custom_fused_ar_rms(
        self,
        input: Tensor,
        residual_inp: Tensor,
        weight: Tensor,
        eps: float,
        use_1stage: bool,
        out_hidden_dim: int = 0,
        gemma_norm: bool = False,
    ) -> Tensor | None:
        flags = {"use_1stage": use_1stage, "out_hidden_dim": out_hidden_dim, "gemma_norm": gemma_norm}
        return self._gated(
            self.should_custom_ar(input),
            partial(_outputs.plain, ZEROS, input, weight, out_hidden_dim),
            partial(self.fused_ar_rms, input, residual_inp, w=weight, eps=eps, **flags),
        )

    @recorded
    def custom_fused_ar_rms_packed_input(
        self,
        input: Tensor,
        residual_inp: Tensor,
        weight: Tensor,
        eps: float,
        use_1stage: bool,
        out_hidden_dim: int = 0,
        prefill_support: bool = False,
        gemma_norm: bool = False,
    ) -> Tensor | None:
        flags = {"use_1stage": use_1stage, "out_hidden_dim": out_hidden_dim, "gemma_norm": gemma_norm}
        run = partial(self.fused_ar_rms, input, residual_inp, w=weight, eps=eps, **flags)
        return self._gated(
            self.should_custom_ar_bytes(input, prefill_support),
            partial(_outputs.plain, ZEROS, input, weight, out_hidden_dim),
            lambda registered: run(registered=False),
        )

    @recorded
    def custom_fused_ar_rms_quant(
        self,
        input: Tensor,
        residual_inp: Tensor,
        weight: Tensor,
        eps: float,
        use_1stage: bool,
        gemma_norm: bool = False,
        emit_bf16: bool = False,
    ):
        flags = {"use_1stage": use_1stage, "gemma_norm": gemma_norm, "emit_bf16": emit_bf16}
        run = partial(self.fused_ar_rms, post_per_token_quant=True, **flags)
        return self._gated(
            self.should_custom_ar(input),
            partial(_outputs.token_fp8, ZEROS, input, weight, emit_bf16),
            partial(run, input, residual_inp, w=weight, eps=eps),
        )

    @recorded
    def fused_ar_rms_per_group_quant(
        self,
        inp: Tensor,
        res_inp: Tensor,
        *,
        w: Tensor,
        eps: float,
        group_size: int = 128,
        registered: bool = False,
        use_1stage: bool = False,
        emit_bf16: bool = False,
        transpose_scale: bool = False,
    ):
        def allocate() -> tuple[Tensor, ...]:
            check_group_size(group_size, inp.element_size(), inp.shape[-1])
            return _outputs.group_fp8(EMPTY, inp, group_size, emit_bf16, transpose_scale)

        flags = {"registered": registered, "use_1stage": use_1stage, "transposed": transpose_scale}
        return run_fused(self, "group_fp8", allocate, inp, res_inp, w, eps=eps, group_size=group_size, **flags)

    @recorded
    def custom_fused_ar_rms_per_group_quant(
        self,
        input: Tensor,
        residual_inp: Tensor,
        weight: Tensor,
        eps: float,
        group_size: int = 128,
        use_1stage: bool = False,
        emit_bf16: bool = False,
        transpose_scale: bool = False,
    ):
        flags = {"use_1stage": use_1stage, "emit_bf16": emit_bf16, "transpose_scale": transpose_scale}
        run = partial(self.fused_ar_rms_per_group_quant, group_size=group_size, **flags)
        return self._gated(
            self.should_custom_ar(input),
            partial(_outputs.group_fp8, ZEROS, input, group_size, emit_bf16, transpose_scale),
            partial(run, input, residual_inp, w=weight, eps=eps),
        )

    @recorded
    def fused_ar_rms_mxfp4_quant(
        self,
        inp: Tensor,
        res_inp: Tensor,
        *,
        w: Tensor,
        eps: float,
        registered: bool = False,
        use_1stage: bool = False,
        emit_bf16: bool = False,
    ):
        def allocate() -> tuple[Tensor, ...]:
            check_mxfp4_width(inp.shape[-1], inp.element_size())
            return _outputs.mxfp4(EMPTY, inp, emit_bf16)

        flags = {"registered": registered, "use_1stage": use_1stage}
        return run_fused(self, "mxfp4", allocate, inp, res_inp, w, eps=eps, **flags)

    @recorded
    def custom_fused_ar_rms_mxfp4_quant(
        self,
        input: Tensor,
        residual_inp: Tensor,
        weight: Tensor,
        eps: float,
        use_1stage: bool = False,
        emit_bf16: bool = False,
    ):
        run = partial(self.fused_ar_rms_mxfp4_quant, use_1stage=use_1stage, emit_bf16=emit_bf16)
        return self._gated(
            self.should_custom_ar(input),
            partial(_outputs.mxfp4, ZEROS, input, emit_bf16),
            partial(run, input, residual_inp, w=weight, eps=eps),
        )

    def _gated(self, fits: bool, zeros: Callable[[], Any], run: Callable[..., Any]) -> Any:
        """Nothing if it does not fit; while warming up for a capture zeros, without the other ranks."""
        if self.disabled or not fits:
            return None
        if self._IS_CAPTURING and not stream_is_capturing():
            return zeros()
        return run(registered=self._IS_CAPTURING)
