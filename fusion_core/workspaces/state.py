"""A backend's state for one process group: its workspace, earlier ones, and the results of its checks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
import torch.distributed as dist

from fusion_core import _cuda
from fusion_core._torch.devices import current_stream_id
from fusion_core._torch.distributed import group_by_name
from fusion_core.fallback import Status
from fusion_core.reason import Reason
from fusion_core.workspaces.call import Handle, Workspace
from fusion_core.workspaces.provider import Provider
from fusion_core.workspaces.zeros import Zeros


@dataclass(eq=False)
class GroupState(Generic[Handle]):
    """A backend's state for one process group and key.

    Attributes:
        key: The group's name, and `Provider.key`.
        group: The process group.
        world_size: Its number of ranks.
        device: The device of this rank.
        provider: The backend's provider.
        handle: The workspace; None before it is made.
        size: Bytes of x that it takes.
        failure: Why no workspace, or no larger one, can be made; it is not tried again.
        checked: Kernel and dtype → None if the self-check passed, else why the kernel is not used.
        captured: Whether a CUDA graph may use the workspace.
        retired: Earlier workspaces that CUDA graphs or unfinished kernels may still use.
        zeros: Zeros for kernels whose residual is not optional.
    """

    key: tuple[Any, ...]
    group: weakref.ref[dist.ProcessGroup]
    world_size: int
    device: torch.device
    provider: Provider[Handle]
    handle: Handle | None = None
    size: int = 0
    failure: Reason | None = None
    checked: dict[tuple[Hashable, torch.dtype], Reason | None] = field(default_factory=dict)
    captured: bool = False
    retired: list[Handle] = field(default_factory=list)
    zeros: Zeros = field(init=False)
    _stream: torch.cuda.Stream | None = field(default=None, init=False)
    _stream_id: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        self.zeros = Zeros(self.device)

    @property
    def workspace(self) -> Workspace[Handle]:
        """The workspace to pass to the provider's `run`."""
        assert self.handle is not None
        return Workspace(self.handle, self.zeros)

    @property
    def name(self) -> str:
        """The group's name."""
        return str(self.key[0])

    @property
    def alive(self) -> bool:
        """Whether the group's name still refers to the group that this state was made for."""
        try:
            return group_by_name(self.key[0]) is self.group()
        except (RuntimeError, LookupError):
            return False

    def enter(self) -> None:
        """Before each use: wait for the use on another stream, and record whether a CUDA graph uses the workspace.

        The caller orders CUDA graphs that are replayed on two streams at once.
        """
        if self.device.type == "cuda":
            stream_id = current_stream_id(self.device.index)
            if stream_id != self._stream_id and not _cuda.is_capturing():
                current = torch.cuda.current_stream(self.device)
                if self._stream is not None:
                    current.wait_stream(self._stream)
                self._stream, self._stream_id = current, stream_id
        if not self.captured and _cuda.is_capturing():
            self.captured = True

    @property
    def handles(self) -> list[Handle]:
        """All workspaces, including those that only CUDA graphs use."""
        return [*self.retired, *([] if self.handle is None else [self.handle])]

    def replace(self, handle: Handle, size: int) -> None:
        """Take a new workspace. The old one is kept if a CUDA graph may use it, else given back."""
        old, self.handle, self.size = self.handle, handle, size
        if old is not None and self.captured:
            self.retired.append(old)
        elif old is not None:
            give_back(self.provider, old)
        self.captured = False

    def abandon(self, reason: Reason) -> None:
        """Stop using the workspace and keep its memory: a kernel that does not end may still use it."""
        if self.handle is not None:
            self.retired.append(self.handle)
        self.handle, self.size, self.failure = None, 0, reason

    def status(self) -> Status:
        """The description of the workspace, its memory and its state."""
        failed = [str(reason) for reason in self.checked.values() if reason is not None]
        state = str(self.failure) if self.failure is not None else "; ".join(failed) or "in use"
        memory = sum(self.provider.memory(handle) for handle in self.handles) + self.zeros.nbytes
        label = self.provider.label(self.key[1])
        return Status(f"{label} of group {self.name}, {self.world_size} ranks", memory, state)

    def release(self) -> None:
        """Give the memory back."""
        handles, self.handle, self.size = self.handles, None, 0
        self.retired.clear()
        self.zeros.clear()
        for handle in handles:
            give_back(self.provider, handle)


def give_back(provider: Provider[Handle], handle: Handle) -> None:
    """Free a workspace. Errors become warnings: a rank that raised alone would leave the others waiting."""
    try:
        provider.free(handle)
    except Exception as error:  # noqa: BLE001  # freeing memory in a library can fail in any way
        words = f"fusion_core: giving a {provider.name} workspace back raised {type(error).__name__}: {error}"
        warnings.warn(words, RuntimeWarning, stacklevel=2)
