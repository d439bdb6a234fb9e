"""Torch's symmetric memory, as this backend uses it: one buffer of a process group, and two kernels over it.

What is said of the kernels here was read in torch's ``CUDASymmetricMemoryOps.cu`` and ``CUDASymmetricMemory-inl``, in
versions of 2025 and 2026. Both kernels take their sum element by element in the order of the ranks, each partial sum
rounded to the dtype: every rank gets the same bits. They use no NVLink multicast.

A buffer can be written again as soon as a kernel over it has ended on this GPU: each of its blocks ends with a barrier
with the block of its number on every other GPU, behind its last read of their buffers. The kernel ends with its last
block, hence after every other GPU's last read.
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
from fusion_core.agree import agreement
from fusion_core.workspaces.per_group import host

GRANULARITY = 2 << 20
"""Bytes to which the driver rounds an allocation that is shared between GPUs."""

NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"

EXCHANGES = "the number of earlier exchanges in this process"
SAME = ("call", "size", "torch", EXCHANGES)


def one_shot(piece: Tensor, out: Tensor, group: str) -> None:
    """Every rank reads all of every rank's ``piece`` and writes the sum into ``out``."""
    torch.ops.symm_mem.one_shot_all_reduce_out(piece, "sum", group, out)


def two_shot(piece: Tensor, out: Tensor, group: str) -> None:
    """Every rank sums its share into its own ``piece``, then gathers all shares into ``out``."""
    torch.ops.symm_mem.two_shot_all_reduce_out(piece, "sum", group, out)


KERNELS: dict[str, Callable[[Tensor, Tensor, str], None]] = {"one_shot": one_shot, "two_shot": two_shot}


def facts(call: str, size: int, device: torch.device, exchanges: int) -> tuple[dict[str, Any], Reason | None]:
    """What ranks tell each other before they make a buffer, and why this rank cannot make one.

    Args:
        call: What asks for it.
        size: Bytes.
        device: This rank's.
        exchanges: How often this process has exchanged handles. Torch counts them by process and not by group, in the
            names under which ranks look for each other (pytorch#196082): ranks with other numbers never meet.
    """
    found: dict[str, Any] = {"call": call, "size": size, "torch": torch.__version__, EXCHANGES: exchanges}
    found |= {"host": host(), "gpu": None}
    if device.type != "cuda":
        return found, None
    try:
        torch.cuda.set_device(device)
        found["gpu"] = str(torch.cuda.get_device_properties(device).uuid)
        if (kind := _handle_class().get_backend(device)) != "CUDA":
            return found, Reason("symmetric_memory", f"torch's symmetric memory is set to {kind}", "CUDA")
        if torch.cuda.mem_get_info(device)[0] < memory(size):
            torch.cuda.empty_cache()
        if (free := torch.cuda.mem_get_info(device)[0]) < memory(size):
            return found, Reason(
                "memory",
                f"{free >> 20} MiB of GPU memory are free, and the buffer takes {memory(size) >> 20} MiB",
                "more free memory",
                hint="leave the model's allocator less, or set FusionConfig(max_tokens=...)",
            )
    except Exception as error:  # noqa: BLE001  # whatever it is: the other ranks must hear of it
        return found, Reason("symmetric_memory", f"asking torch raised {type(error).__name__}: {error}")
    return found, None


def memory(size: int) -> int:
    """Bytes of GPU memory that a buffer takes: its signals lie in the same allocation."""
    return (size // GRANULARITY + 1) * GRANULARITY


def disagreement(ranks: list[dict[str, Any]], device: torch.device) -> Reason | None:
    """What differs between ranks that must not, or whose memory this rank's GPU cannot reach."""
    if reason := agreement.disagreement(ranks, SAME, "the same graphs and the same torch on all ranks"):
        return reason
    if device.type != "cuda":
        return None
    here = {str(torch.cuda.get_device_properties(n).uuid): n for n in range(torch.cuda.device_count())}
    for rank, each in enumerate(ranks):
        other = here.get(each["gpu"], device.index)  # one that this process does not see shows in the exchange
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            return Reason("links", f"GPU {device.index} cannot reach the memory of rank {rank}'s GPU", "linked GPUs")
    return None


def allocate(size: int, device: torch.device) -> Tensor:
    """Bytes that can be shared. Not from torch's memory pool, whose offsets the kernels of some releases leave out."""
    buffer: Tensor = _handle_class().empty_strided_p2p((size,), (1,), torch.uint8, device)
    return buffer


def exchange(buffer: Tensor, group: dist.ProcessGroup, seconds: float) -> None:
    """Let the GPUs of all ranks reach each other's buffer; all ranks call it together.

    Raises:
        TimeoutError: where the others have not come in time.
        RuntimeError: where torch used NVLink multicast.
        Exception: whatever torch raises.
    """
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            _exchange(buffer, group.group_name)
        except BaseException as error:  # noqa: BLE001  # raised on the caller's thread
            outcome.append(error)

    # torch waits in the group's store, by the store's time limit, and for a message between processes, by none
    thread = threading.Thread(target=work, name="fusion_reference exchange", daemon=True)
    with _multicast_off(), _patience(group, seconds):
        thread.start()
        thread.join(1.5 * seconds)  # the store's limit comes first, where it is the store that is waited for
    if thread.is_alive():
        raise TimeoutError(f"the exchange of handles did not end within {seconds:g} s")
    if outcome:
        raise outcome[0]


def _exchange(buffer: Tensor, group: str) -> None:
    if buffer.device.type == "cuda":
        torch.cuda.set_device(buffer.device)
    # A two-shot of no elements exchanges handles and launches nothing, and unlike `rendezvous` itself gives up Python's
    # lock while it waits.
    torch.ops.symm_mem.two_shot_all_reduce_(buffer.view(torch.float32)[:0], "sum", group)
    if _handle_class().rendezvous(buffer, group).multicast_ptr:
        raise RuntimeError("torch's symmetric memory uses NVLink multicast, which nobody asked for")


@contextlib.contextmanager
def _multicast_off() -> Iterator[None]:
    """Torch reads this in each exchange, and makes a multicast object without it. The kernels here have no use for one.

    It is broken or shared on some machines, where making one takes the GPUs of the host out of service.
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
    """Have waits in the group's store end after so many seconds, not after the group's own time limit."""
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
