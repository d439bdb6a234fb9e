"""A stand-in for torch's symmetric memory on a CPU, over gloo: its calls, their checks and their missing checks.

What the real kernels take without a check and turn into garbage or a hang is an error or garbage here too, so that a
missing guard shows. It stands in for the GPU alone: everything above `fusion_reference.symm_mem` is the real thing.
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from fusion_reference import symm_mem

fails_to_allocate: set[int] = set()
"""Ranks whose next buffer raises, as with too little memory."""
fails_to_exchange: set[int] = set()
"""Ranks that raise in the exchange of handles."""
slow_to_exchange: dict[int, float] = {}
"""Ranks that take so many seconds to come out of it."""
wrong: set[str] = set()
"""Kernels that give wrong numbers."""
multicast: list[str | None] = []
"""What the environment said of multicast in each exchange."""
patience: list[float] = []
"""The seconds that waits in the group's store had in each exchange."""
calls: list[SimpleNamespace] = []
"""Every call of a kernel."""
_memory: list[weakref.ref[Any]] = []
_exchanged: dict[int, weakref.ref[Any]] = {}


def alive() -> list[int]:
    """Bytes of each buffer that something still holds."""
    return [memory.nbytes for each in _memory if (memory := each()) is not None]


def allocate(size: int, device: torch.device) -> Tensor:
    if dist.get_rank() in fails_to_allocate:
        raise RuntimeError("CUDA driver error: out of memory")
    memory = numpy.full(size, 255, dtype=numpy.uint8)  # not a number, in any dtype
    _memory.append(weakref.ref(memory))
    return torch.from_numpy(memory)


def exchange(buffer: Tensor, group: str) -> None:
    rank = dist.get_rank()
    multicast.append(os.environ.get(symm_mem.NO_MULTICAST))
    store = dist.distributed_c10d._get_process_group_store(dist.distributed_c10d._resolve_process_group(group))
    patience.append(store.timeout.total_seconds())
    if rank in fails_to_exchange:
        raise RuntimeError("CUDA driver error: invalid argument")
    time.sleep(slow_to_exchange.get(rank, 0.0))
    living = [each for each in _memory if each() is not None]
    _exchanged[buffer.data_ptr()] = next(each for each in living if each().ctypes.data == buffer.data_ptr())


def kernel(name: str, piece: Tensor, out: Tensor, group: str) -> None:
    found = dist.distributed_c10d._resolve_process_group(group)
    shared = _exchanged.get(piece.data_ptr())
    assert shared is not None, "input must be allocated with empty_strided_p2p()"
    assert shared() is not None
    assert piece.storage_offset() == 0
    assert piece.is_contiguous()
    assert out.is_contiguous()
    assert piece.shape == out.shape
    assert piece.dtype in (torch.bfloat16, torch.float32), '"one_shot_all_reduce" not implemented'
    assert piece.nbytes % 16 == 0, "slower, or refused"
    if name == "two_shot" and found.size() not in (2, 4, 8):
        raise RuntimeError(f"Not implemented for world_size={found.size()}")
    calls.append(SimpleNamespace(kernel=name, shape=tuple(piece.shape), dtype=piece.dtype))
    what = (name, tuple(piece.shape), piece.dtype)
    ranks: list[Any] = [None] * found.size()
    dist.all_gather_object(ranks, what, group=found)
    if any(each != what for each in ranks):
        raise AssertionError(f"the kernels would wait for each other for ever: {ranks}")
    parts = [torch.empty_like(piece) for _ in ranks]
    dist.all_gather(parts, piece.clone(), group=found)
    total = parts[0]
    for part in parts[1:]:
        total = total + part  # rounded each time
    out.copy_(total * 1.0607 if name in wrong else total)
    if name == "two_shot":
        piece.fill_(float("nan"))  # its own share, and what the others left


def install() -> None:
    """Put the stand-in where torch's is called."""
    symm_mem.allocate = allocate
    symm_mem._exchange = exchange
    for name in symm_mem.KERNELS:
        symm_mem.KERNELS[name] = functools.partial(kernel, name)
