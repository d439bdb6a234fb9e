"""Buffers in symmetric memory, and two kernels over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusion_core import Reason
from fusion_core.workspaces import Call, Exchange, NoAgreement, Provider, Workspace, Workspaces
from fusion_reference import symm_mem

EXCHANGES = "the number of earlier exchanges in this process"

CHECKED = (33, 1024)
"""Shape of the self-check: about as many blocks of threads as the kernels ever launch, and an odd share per rank."""

MOST_PIECES = 1024


@dataclass(eq=False)
class Buffer:
    """Memory that all ranks can access, and views of its start with the dtypes and shapes of calls."""

    memory: Tensor
    _pieces: dict[tuple[torch.dtype, torch.Size], Tensor] = field(default_factory=dict)

    def piece(self, like: Tensor) -> Tensor:
        """A contiguous view of the memory's start with a tensor's dtype and shape."""
        form = like.dtype, like.shape
        found = self._pieces.get(form)
        if found is None:
            if len(self._pieces) >= MOST_PIECES:
                self._pieces.clear()
            with torch.inference_mode(False):  # a normal tensor: later callers may not be in inference mode
                found = self.memory.view(like.dtype)[: like.numel()].view(like.shape)
            self._pieces[form] = found
        return found


class SymmetricMemory(Provider[Buffer]):
    """Torch's symmetric memory.

    Attributes:
        exchanges: How often this process has exchanged handles. Torch counts exchanges per process and not per group,
            and ranks find each other by names with this count (pytorch#196082): with different counts they never do.
        spoilt: Why no further exchange is possible: after a failed one, torch's count is no longer the same on all
            ranks.
    """

    name = "reference"
    report_to = "pytorch/pytorch"
    step = 60.0  # in which no rank does more than CUDA calls
    making = 120.0
    most: int = 512 << 20
    one_at_a_time = True  # torch counts exchanges per process

    def __init__(self) -> None:
        self.exchanges = 0
        self.spoilt: Reason | None = None

    def label(self, key: object) -> str:
        """The description of a buffer."""
        return "symmetric memory"

    def check_shape(self, call: Call) -> tuple[int, int]:
        """One shape for calls of all sizes."""
        return CHECKED

    def facts(self, call: Call, size: int) -> tuple[dict[str, Any], Reason | None]:
        """The facts that ranks compare, and why this rank cannot make a buffer."""
        found = {"size": size, "torch": torch.__version__, EXCHANGES: self.exchanges}
        return found, symm_mem.unusable(size, call.x.device) or self.spoilt

    def create(self, call: Call, size: int, exchange: Exchange) -> Buffer:
        """Allocate a buffer, and give all ranks access to each other's."""
        buffer: Tensor | None = None
        problem: Reason | None = None
        try:
            buffer = symm_mem.allocate(size, call.x.device)
        except Exception as error:  # noqa: BLE001  # whatever it is: the other ranks must learn of it
            problem = Reason("memory", f"allocating {size >> 20} MiB raised {type(error).__name__}: {error}")
        # before the exchange: a rank that stayed away would leave the others waiting in it
        if reason := exchange.outcome(problem):
            raise NoAgreement(reason)
        assert buffer is not None
        self.exchanges += 1
        try:
            symm_mem.exchange(buffer, exchange.group, self.step / 2)
        except Exception as error:  # noqa: BLE001  # as above
            problem = Reason("exchange", f"the exchange of handles raised {type(error).__name__}: {error}")
        if reason := exchange.outcome(problem):
            self.spoilt = reason
            raise NoAgreement(reason)
        return Buffer(buffer)

    def free(self, handle: Buffer) -> None:
        """Do nothing: the driver frees the memory when the last rank has released it."""

    def memory(self, handle: Buffer) -> int:
        """Bytes of GPU memory."""
        return symm_mem.memory(handle.memory.numel())

    def run(self, workspace: Workspace[Buffer], call: Call) -> Mapping[str, Tensor]:
        """The sum, in newly allocated memory: the next call overwrites the buffer.

        The copy into the buffer is a separate kernel. ``one_shot_all_reduce_copy`` includes it, but its blocks signal
        that their part is written before all of their threads have written it: no ``__syncthreads`` is between the two.
        ``copy_`` is the driver's copy, which takes some microseconds longer than a kernel in a CUDA graph.
        """
        x = call.x
        out, piece = torch.empty(x.shape, dtype=x.dtype, device=x.device), workspace.handle.piece(x)
        torch.mul(x, 1.0, out=piece)
        symm_mem.KERNELS[str(call.kernel)](piece, out, call.group)
        return {"reduced": out}


def strategy(kernel: str) -> str:
    """The name of the strategy that runs a kernel."""
    return f"reference.symm_mem_{kernel}"


MEMORY = SymmetricMemory()
BUFFERS = Workspaces(MEMORY)
