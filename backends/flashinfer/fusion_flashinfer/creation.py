"""How one workspace of FlashInfer is made, measured and given back. Multicast is off unless mnnvl is asked for."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
import torch.distributed as dist

from fusion_core import Reason
from fusion_core.agree import agreement
from fusion_core.agree.agreement import Agreement
from fusion_core.workspaces.per_group import host
from fusion_flashinfer import library
from fusion_flashinfer.availability import multicast_off
from fusion_flashinfer.calls import Call, call_for

ARRIVAL = 900.0
"""Seconds for all ranks to come to their first call: one may still compile its model, or build FlashInfer's kernels."""

STEP = 90.0
"""Seconds for each later step, in which no rank does more than CUDA calls; FlashInfer's own exchange gives up at 30."""

GRANULARITY = 2 << 20
"""Bytes to which the driver rounds an allocation that is shared between GPUs."""


def needed(tokens: int, hidden: int, dtype: torch.dtype, world_size: int) -> int:
    """Bytes of device memory that a workspace takes on each rank (``trtllm_ar.py``: one buffer, flags, three more)."""
    buffer = world_size * tokens * hidden * dtype.itemsize
    return _rounded(buffer) + _rounded(world_size * 256 * 4) + _rounded(3 * buffer)


def _rounded(size: int) -> int:
    return -(-size // GRANULARITY) * GRANULARITY


def facts(
    tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, world_size: int, *, mnnvl: bool
) -> tuple[dict[str, Any], Reason | None]:
    """What must be the same on all ranks, and why this rank cannot make a workspace.

    Imports FlashInfer, and builds its kernels where they are not built yet.
    """
    found: dict[str, Any] = {"tokens": tokens, "hidden": hidden, "dtype": str(dtype), "mnnvl": mnnvl}
    found |= {"host": host(), "gpu": None, "version": None}
    try:
        library.comm()
        found["version"] = library.version()
        if not mnnvl and library.confidential_computing():
            return found, Reason(
                "confidential_computing",
                "the GPU is in confidential computing mode, where FlashInfer's workspace would use NVLink multicast",
                "a GPU outside of it",
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
            found["gpu"] = str(torch.cuda.get_device_properties(device).uuid)
            size = needed(tokens, hidden, dtype, world_size)
            if torch.cuda.mem_get_info(device)[0] < size + GRANULARITY:
                torch.cuda.empty_cache()
            if (free := torch.cuda.mem_get_info(device)[0]) < size + GRANULARITY:
                return found, Reason(
                    "memory",
                    f"{free >> 20} MiB of GPU memory are free, and the workspace takes {size >> 20} MiB",
                    "more free memory",
                    hint="leave the model's allocator less, or set FusionConfig(max_tokens=...)",
                )
    except Exception as error:  # noqa: BLE001  # an import or a build fails in any way; the other ranks must hear of it
        return found, Reason("import", f"importing flashinfer.comm raised {type(error).__name__}: {error}")
    return found, None


def disagreement(ranks: list[dict[str, Any]]) -> Reason | None:
    """What differs between ranks that must not, or is the same and must not be."""
    same = ("call", "tokens", "hidden", "dtype", "mnnvl", "version")
    return agreement.disagreement(ranks, same, "the same graphs and the same FlashInfer on all ranks")


def create(
    exchange: Agreement, group: dist.ProcessGroup, tokens: int, hidden: int, dtype: torch.dtype, *, mnnvl: bool
) -> Any:
    """FlashInfer's workspace; all ranks of the group call it together.

    Raises:
        RuntimeError: where what was made is not what was asked for, or uses multicast without being asked to.
        Exception: whatever FlashInfer raises.
    """
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
        group=group,  # both: without them FlashInfer meets over the default group, and hangs (vLLM#45917)
    )
    if not mnnvl:
        if made.backend != "trtllm" or type(made).__name__ != "TRTLLMAllReduceFusionWorkspace":
            raise RuntimeError(f"asked for a trtllm workspace, FlashInfer made {type(made).__name__} ({made.backend})")
        if not made.mem_handles or any(each._enable_multicast or each.mc_ptr for each in made.mem_handles):
            raise RuntimeError("FlashInfer's trtllm workspace uses NVLink multicast, which nobody asked for")
        if not made.is_buffer_size_sufficient(exchange.size, tokens, hidden, dtype):
            raise RuntimeError(f"FlashInfer's workspace is too small for the {tokens} x {hidden} asked for")
    return made


def call(made: Any) -> Call:
    """How to call kernels on a workspace."""
    return call_for(made, library.comm().allreduce_fusion, library.below())


def memory(made: Any) -> int:
    """Bytes of device memory that a workspace holds on this rank; 0 where it does not say."""
    metadata = getattr(made, "metadata", None)
    if not isinstance(metadata, dict):
        return 0
    names = ("buffer_size", "flag_size", "lamport_buffer_size")
    return sum(_rounded(int(metadata.get(name, 0))) for name in names)


def free(made: Any) -> None:
    """Give a workspace's memory back: ``destroy()`` alone leaves it in FlashInfer's own table for good."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with contextlib.suppress(AttributeError):
        library.comm().trtllm_destroy_ipc_workspace_for_all_reduce_fusion(made.ipc_handles)
    made.destroy()
    with contextlib.suppress(AttributeError):
        made._internal_workspace = None
    gc.collect()  # its handles lie in cycles
