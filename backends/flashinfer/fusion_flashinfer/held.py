"""What one process group has of FlashInfer's: a workspace for one dtype class, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fusion_core import Reason
from fusion_core.workspaces.per_group import PerGroup
from fusion_flashinfer import creation


class Ready:
    """A workspace that takes calls of one form.

    Attributes:
        held: What it belongs to.
        handle: FlashInfer's workspace.
        one_shot: Which of the two kernels to run; None to leave it to FlashInfer (mnnvl).
        call: How to call kernels on it, see `fusion_flashinfer.calls`.
    """

    __slots__ = ("_zeros", "call", "handle", "held", "one_shot")

    def __init__(self, held: Held, one_shot: bool | None) -> None:
        self.held = held
        self.handle = held.handle
        self.call = held.call
        self.one_shot = one_shot
        self._zeros: Tensor | None = None

    def zeros(self, like: Tensor) -> Tensor:
        """Zeros of a tensor's shape and dtype, for kernels whose residual is not optional; read only."""
        if self._zeros is None or self._zeros.shape != like.shape:
            found, lasts = self.held.zeros_like(like, self.held.elements)
            if not lasts:
                return found
            self._zeros = found
        return self._zeros


@dataclass(eq=False)
class Held(PerGroup):
    """What one process group has, for one dtype class.

    Attributes:
        key: The group's name, whether the dtype is float32, whether the kernels are mnnvl's.
        handle: FlashInfer's workspace; None before it is made.
        elements: Its capacity.
        failure: Why there is none, or none larger, and will be none.
        checked: (code, dtype, one-shot, PDL) → None where the self-check passed, else why not.
        retired: Smaller workspaces, and their zeros, that CUDA graphs may hold.
    """

    handle: Any = None
    call: Callable[..., Any] = field(default=lambda **_: None)
    elements: int = 0
    failure: Reason | None = None
    checked: dict[tuple[Any, ...], Reason | None] = field(default_factory=dict)
    retired: list[tuple[Any, list[Tensor]]] = field(default_factory=list)

    def replace(self, made: Any, elements: int) -> None:
        """Take a new workspace; the old one is kept where a graph may hold it, else given back."""
        old, zeros = self.handle, list(self.zeros.values())
        self.handle, self.elements, self.call = made, elements, creation.call(made)
        self.zeros.clear()
        if old is not None and self.captured:
            self.retired.append((old, zeros))
        elif old is not None:
            creation.free(old)
        self.captured = False

    @property
    def memory(self) -> int:
        """Bytes of GPU memory."""
        owned = [*self.retired, *([] if self.handle is None else [(self.handle, list(self.zeros.values()))])]
        return sum(creation.memory(handle) + sum(each.nbytes for each in zeros) for handle, zeros in owned)

    def release(self) -> None:
        """Give the memory back."""
        handles = [handle for handle, _ in self.retired] + ([] if self.handle is None else [self.handle])
        self.handle, self.elements = None, 0
        self.retired.clear()
        self.zeros.clear()
        for handle in handles:
            creation.free(handle)
