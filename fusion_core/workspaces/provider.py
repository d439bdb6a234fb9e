"""The class that a backend's author writes for kernels whose memory the ranks of a group share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic

import torch.distributed as dist
from torch import Tensor

from fusion_core.agree.agreement import Agreement
from fusion_core.reason import Reason
from fusion_core.workspaces.call import Call, Handle, Workspace


class Exchange(Agreement):
    """The ranks of a group while they make one workspace. Every rank must make the same calls in the same order.

    It can also be passed to FlashInfer as its communication backend.

    Attributes:
        rank: This rank in the group.
        size: The number of ranks.
        group: The process group.
        facts: The facts of `Provider.facts` on each rank, in rank order.
    """

    group: dist.ProcessGroup
    facts: Sequence[Mapping[str, Any]] = ()


class Provider(ABC, Generic[Handle]):
    """Makes workspaces of one kind, gives them back, and calls kernels on them.

    `create` runs on its own thread, on all ranks of a group at once, after they agreed that each of them can make a
    workspace. It never runs while a CUDA graph is captured. If it raises on one rank, the other ranks learn why.

    Attributes:
        name: The backend's name.
        report_to: Where a kernel that fails its self-check is to be reported, for the reason's hint.
        arrival: Seconds for all ranks to reach their first call; one may still be compiling its model or kernels.
        step: Seconds for each later step, and for one self-check.
        making: Seconds for `create`.
        least: Bytes of x that the smallest workspace takes.
        most: Bytes of x that the largest workspace of `room` takes; None for no bound.
        one_at_a_time: Whether a process makes the workspaces of its groups one after another, for a library that counts
            them per process and not per group. Threads that first use several groups in different orders on different
            ranks then block each other until a time limit.
        may_differ: Names among `facts` that may differ between ranks; the others must be equal.
    """

    name: str
    report_to: str = "its authors"
    arrival: float = 900.0
    step: float = 90.0
    making: float = 90.0
    least: int = 16 << 20
    most: int | None = None
    one_at_a_time: bool = False
    may_differ: tuple[str, ...] = ()

    def key(self, call: Call) -> Hashable:
        """The key of a call's workspace in its group. Calls with equal keys share one; by default all do."""
        return None

    def label(self, key: Hashable) -> str:
        """The description of a workspace with this key, a phrase for `fusion-core backends`."""
        return f"{self.name} workspace"

    def room(self, call: Call) -> int:
        """Bytes of x that a new workspace must take. It always takes at least the call.

        By default the next power of two, and at most the bytes of ``max_tokens`` rows.
        """
        wanted = max(self.least, 1 << (call.x.nbytes - 1).bit_length())
        if call.max_tokens is not None:
            wanted = min(wanted, call.max_tokens * call.row_bytes)
        return wanted if self.most is None else min(wanted, self.most)

    def check_shape(self, call: Call) -> tuple[int, int]:
        """Rows and hidden size for the self-check of the call's kernel; by default an odd number of rows."""
        return max(2 * call.world_size + 1, 5), call.x.shape[-1]

    def takes(self, handle: Handle, call: Call) -> Reason | None:
        """The reason why a workspace does not take a call that it has room for, the same on all ranks; or None."""
        return None

    @abstractmethod
    def facts(self, call: Call, size: int) -> tuple[dict[str, Any], Reason | None]:
        """The facts that ranks compare before any of them makes a workspace, and why this rank cannot make one.

        The host and the GPU are compared in any case.

        Args:
            call: The first call that asks for it.
            size: Bytes of x that the workspace must take.
        """

    @abstractmethod
    def create(self, call: Call, size: int, exchange: Exchange) -> Handle:
        """Make a workspace, together with the other ranks.

        Args:
            call: The first call that asks for it.
            size: Bytes of x that it must take.
            exchange: The ranks, to exchange handles and other data.

        Raises:
            Exception: any; all ranks then run without a workspace.
        """

    @abstractmethod
    def free(self, handle: Handle) -> None:
        """Give a workspace's memory back."""

    @abstractmethod
    def memory(self, handle: Handle) -> int:
        """Bytes of device memory that a workspace takes on this rank."""

    @abstractmethod
    def run(self, workspace: Workspace[Handle], call: Call) -> Mapping[str, Tensor] | None:
        """Run one call of a kernel without waiting for the device. No result may be in the workspace's memory.

        Returns:
            The outputs by name; None if the kernel does not take the call, on all ranks or on none.
        """
