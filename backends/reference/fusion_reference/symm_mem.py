"""Torch's symmetric memory, as this backend uses it: one buffer per process group, and two kernels over it.

The source for the facts here is torch's ``CUDASymmetricMemoryOps.cu`` and ``CUDASymmetricMemory-inl``, in versions of
2025 and 2026. Both kernels add element by element in the order of the ranks and round each partial sum to the dtype, so
every rank gets the same bits. They use no NVLink multicast.

A buffer can be written again as soon as a kernel over it has ended on this GPU. After its last read of the other GPUs'
buffers, each block waits at a barrier with the block of the same number on every other GPU. The kernel ends with its
last block, hence after every other GPU's last read.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core import Reason
from fusion_core.workspaces import too_little_memory

GRANULARITY = 2 << 20
"""Bytes to which the driver rounds an allocation that is shared between GPUs."""

NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


def one_shot(piece: Tensor, out: Tensor, group: str) -> None:
    """Every rank reads all of every rank's ``piece`` and writes the sum into ``out``."""
    torch.ops.symm_mem.one_shot_all_reduce_out(piece, "sum", group, out)


def two_shot(piece: Tensor, out: Tensor, group: str) -> None:
    """Every rank sums its share into its own ``piece``, then gathers all shares into ``out``."""
    torch.ops.symm_mem.two_shot_all_reduce_out(piece, "sum", group, out)


KERNELS: dict[str, Callable[[Tensor, Tensor, str], None]] = {"one_shot": one_shot, "two_shot": two_shot}


def unusable(size: int, device: torch.device) -> Reason | None:
    """The reason why this rank cannot make a buffer of this many bytes, or None."""
    if device.type != "cuda":
        return None
    if (kind := _handle_class().get_backend(device)) != "CUDA":
        return Reason("symmetric_memory", f"torch's symmetric memory is set to {kind}", "CUDA")
    return too_little_memory(device, memory(size))


def memory(size: int) -> int:
    """Bytes of GPU memory that a buffer takes: its signals are in the same allocation."""
    return (size // GRANULARITY + 1) * GRANULARITY


def allocate(size: int, device: torch.device) -> Tensor:
    """Allocate bytes to share. Not from torch's memory pool, whose offsets the kernels of some releases ignore."""
    buffer: Tensor = _handle_class().empty_strided_p2p((size,), (1,), torch.uint8, device)
    return buffer


def exchange(buffer: Tensor, group: dist.ProcessGroup, seconds: float) -> None:
    """Give the GPUs of all ranks access to each other's buffer. All ranks call it together.

    Raises:
        TimeoutError: if the other ranks do not come in time.
        RuntimeError: if torch used NVLink multicast.
        Exception: any that torch raises.
    """
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            _exchange(buffer, group.group_name)
        except BaseException as error:  # noqa: BLE001  # raised on the caller's thread
            outcome.append(error)

    # torch waits in the group's store under its time limit, and for a message between processes without one
    thread = threading.Thread(target=work, name="fusion_reference exchange", daemon=True)
    with _multicast_off(), _patience(group, seconds):
        thread.start()
        thread.join(1.5 * seconds)  # if it waits in the store, the store's limit comes first
    if thread.is_alive():
        raise TimeoutError(f"the exchange of handles did not end within {seconds:g} s")
    if outcome:
        raise outcome[0]


def _exchange(buffer: Tensor, group: str) -> None:
    if buffer.device.type == "cuda":
        torch.cuda.set_device(buffer.device)
    # A two-shot of zero elements exchanges handles and launches nothing. Unlike `rendezvous` itself, it releases
    # Python's lock while it waits.
    torch.ops.symm_mem.two_shot_all_reduce_(buffer.view(torch.float32)[:0], "sum", group)
    if _handle_class().rendezvous(buffer, group).multicast_ptr:
        raise RuntimeError("torch's symmetric memory uses NVLink multicast, which nobody asked for")


@contextlib.contextmanager
def _multicast_off() -> Iterator[None]:
    """Set the variable without which torch makes a multicast object in each exchange. The kernels here do not use one.

    Multicast is broken or shared on some machines, where making an object takes the host's GPUs out of service.
    """
    before = os.environ.get(NO_MULTICAST)
    os.environ[NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_MULTICAST]
        else:
            os.environ[NO_MULTICAST] = before


@contextlib.contextmanager
def _patience(group: dist.ProcessGroup, seconds: float) -> Iterator[None]:
    """Within a block, end waits in the group's store after this many seconds, not after the group's own limit."""
    store: Any = dist.distributed_c10d._get_process_group_store(group)
    before = store.timeout
    store.set_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        store.set_timeout(before)


def _handle_class() -> Any:
    from torch._C import _distributed_c10d

    return _distributed_c10d._SymmetricMemory
