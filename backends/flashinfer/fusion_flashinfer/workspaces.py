"""FlashInfer's workspaces: how one is made, measured and given back. Multicast is off unless mnnvl is asked for."""

from __future__ import annotations

import contextlib
import gc
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_core import Reason
from fusion_core.workspaces import Call, Exchange, Provider, Workspace, Workspaces, too_little_memory
from fusion_flashinfer import calls, library
from fusion_flashinfer.availability import multicast_off
from fusion_flashinfer.fused import fused
from fusion_flashinfer.kernels import Form, allocate
from fusion_flashinfer.limits import MOST

GRANULARITY = 2 << 20
"""Bytes to which the driver rounds an allocation that is shared between GPUs."""


class Made(NamedTuple):
    """A workspace of FlashInfer's, and the function that calls kernels on it."""

    workspace: Any
    call: calls.Call


class FlashInfer(Provider[Made]):
    """FlashInfer's workspaces: one per process group, width of dtype and kind of kernels."""

    name = "flashinfer"
    report_to = "flashinfer-ai/flashinfer"
    arrival = 900.0  # a rank may still build FlashInfer's kernels
    step = making = 90.0  # no rank does more than CUDA calls; FlashInfer's own exchange gives up after 30 s
    least = 2 << 20

    def key(self, call: Call) -> tuple[bool, bool]:
        """Whether the dtype is float32, and whether the kernels are mnnvl's."""
        return call.x.dtype is torch.float32, form_of(call).mnnvl

    def label(self, key: Any) -> str:
        """The description of a workspace."""
        wide, mnnvl = key
        return f"{'mnnvl' if mnnvl else 'trtllm'} workspace ({32 if wide else 16} bits)"

    def room(self, call: Call) -> int:
        """All ``max_tokens`` rows at once, if that is set; more than `MOST` would overflow an index of the kernels."""
        return super().room(call) if call.max_tokens is None else min(call.max_tokens * call.row_bytes, MOST)

    def facts(self, call: Call, size: int) -> tuple[dict[str, Any], Reason | None]:
        """The facts that must be the same on all ranks, and why this rank cannot make a workspace.

        Imports FlashInfer, and builds its kernels if they are not built yet.
        """
        x, mnnvl = call.x, form_of(call).mnnvl
        tokens, hidden = shape(call, size)
        found: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "dtype": str(x.dtype), "mnnvl": mnnvl}
        try:
            library.comm()
            found["version"] = library.version()
            if not mnnvl and library.confidential_computing():
                words = "the GPU is in confidential computing mode, where FlashInfer's workspace uses NVLink multicast"
                return found, Reason("confidential_computing", words, "a GPU outside of it")
        except Exception as error:  # noqa: BLE001  # an import or a build can fail in any way
            return found, Reason("import", f"importing flashinfer.comm raised {type(error).__name__}: {error}")
        return found, too_little_memory(x.device, needed(tokens * call.row_bytes, call.world_size), GRANULARITY)

    def create(self, call: Call, size: int, exchange: Exchange) -> Made:
        """Make a FlashInfer workspace together with the other ranks.

        Raises:
            RuntimeError: if FlashInfer made another workspace than asked for, or one with unrequested multicast.
            Exception: any that FlashInfer raises.
        """
        (tokens, hidden), dtype, mnnvl = shape(call, size), call.x.dtype, form_of(call).mnnvl
        if mnnvl and multicast_off():
            raise RuntimeError(f"mnnvl uses NVLink multicast, which the environment switches off ({multicast_off()})")
        made = library.comm().create_allreduce_fusion_workspace(
            backend="mnnvl" if mnnvl else "trtllm",  # by name: "auto" takes mnnvl wherever the GPU has multicast
            world_size=exchange.size,
            rank=exchange.rank,
            max_token_num=tokens,
            hidden_dim=hidden,
            dtype=dtype,
            comm_backend=exchange,
            group=exchange.group,  # both: without them FlashInfer uses the default group, and hangs (vLLM#45917)
        )
        if not mnnvl:
            kind = type(made).__name__
            if made.backend != "trtllm" or kind != "TRTLLMAllReduceFusionWorkspace":
                raise RuntimeError(f"asked for a trtllm workspace, FlashInfer made {kind} ({made.backend})")
            if not made.mem_handles or any(each._enable_multicast or each.mc_ptr for each in made.mem_handles):
                raise RuntimeError("FlashInfer's trtllm workspace uses NVLink multicast, which nobody asked for")
            if not made.is_buffer_size_sufficient(exchange.size, tokens, hidden, dtype):
                raise RuntimeError(f"FlashInfer's workspace is too small for the {tokens} x {hidden} asked for")
        return Made(made, calls.call_for(made, library.comm().allreduce_fusion, library.below()))

    def free(self, handle: Made) -> None:
        """Give a workspace's memory back: ``destroy()`` alone leaves it in FlashInfer's own table forever."""
        made = handle.workspace
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        with contextlib.suppress(AttributeError):
            library.comm().trtllm_destroy_ipc_workspace_for_all_reduce_fusion(made.ipc_handles)
        made.destroy()
        with contextlib.suppress(AttributeError):
            made._internal_workspace = None
        gc.collect()  # its handles are in reference cycles

    def memory(self, handle: Made) -> int:
        """Bytes of device memory that a workspace takes on this rank; 0 if it has no metadata."""
        metadata = getattr(handle.workspace, "metadata", None)
        if not isinstance(metadata, dict):
            return 0
        names = ("buffer_size", "flag_size", "lamport_buffer_size")
        return sum(_rounded(int(metadata.get(name, 0))) for name in names)

    def run(self, workspace: Workspace[Made], call: Call) -> dict[str, Tensor]:
        """Allocate the results and launch the kernel once."""
        kernel = form_of(call).kernel
        option = {name: call.scalars[name] for name in kernel.option} if kernel.option else {}
        results = allocate(kernel, call.tensors["x"], **option)
        fused(workspace, call, results)
        return results


def form_of(call: Call) -> Form:
    """The form that is launched."""
    assert isinstance(call.kernel, Form)
    return call.kernel


def shape(call: Call, size: int) -> tuple[int, int]:
    """Tokens and hidden size of a workspace that takes this many bytes of x."""
    return -(-size // call.row_bytes), call.x.shape[-1]


def needed(size: int, world_size: int) -> int:
    """Bytes of device memory that a workspace takes on each rank (``trtllm_ar.py``: one buffer, flags, three more)."""
    buffer = world_size * size
    return _rounded(buffer) + _rounded(world_size * 256 * 4) + _rounded(3 * buffer)


def _rounded(size: int) -> int:
    return -(-size // GRANULARITY) * GRANULARITY


WORKSPACES = Workspaces(FlashInfer())
