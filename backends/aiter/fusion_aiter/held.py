"""What one process group has of AITER."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fusion_aiter import creation
from fusion_core import Reason
from fusion_core.workspaces.per_group import PerGroup


@dataclass(eq=False)
class Held(PerGroup):
    """What one process group has.

    Attributes:
        arch: The GPU's architecture.
        communicator: AITER's; None before it is made.
        made: With its process group, for `creation.free`.
        max_size: Bytes of one rank's input that it takes.
        failure: Why there is none, or none larger, and will be none.
        checked: (kernel's name, dtype, one stage, large) → None where the self-check passed, else why not.
        retired: Smaller ones that CUDA graphs may hold.
        outgrown: Zeros that were too few for a later call, and that CUDA graphs and other streams may still read.
    """

    arch: str
    communicator: Any = None
    made: creation.Made | None = None
    max_size: int = 0
    failure: Reason | None = None
    checked: dict[tuple[Any, ...], Reason | None] = field(default_factory=dict)
    retired: list[creation.Made] = field(default_factory=list)
    outgrown: list[Tensor] = field(default_factory=list)

    def zeros_like(self, like: Tensor, room: int) -> tuple[Tensor, bool]:
        """Zeros of a tensor's shape, as in the base class; what has been given out stays what it is."""
        before = self.zeros.get(like.dtype)
        found = super().zeros_like(like, room)
        if before is not None and before is not self.zeros[like.dtype]:
            self.outgrown.append(before)
        return found

    def replace(self, made: creation.Made, max_size: int) -> None:
        """Take a new communicator; the old one is kept where a graph may hold it, else given back."""
        old, self.made, self.communicator, self.max_size = self.made, made, made.communicator, max_size
        if old is not None and self.captured:
            self.retired.append(old)
        elif old is not None:
            creation.free(old)
        self.captured = False

    @property
    def memory(self) -> int:
        """Bytes of GPU memory."""
        made = [*self.retired, *([] if self.made is None else [self.made])]
        return sum(each.memory for each in made) + sum(each.nbytes for each in (*self.zeros.values(), *self.outgrown))

    def release(self) -> None:
        """Give the memory back."""
        made = [*self.retired, *([] if self.made is None else [self.made])]
        self.communicator = self.made = None
        self.max_size = 0
        self.retired.clear()
        self.zeros.clear()
        self.outgrown.clear()
        for each in made:
            creation.free(each)


class Ready(NamedTuple):
    """A communicator that takes calls of one form, and in how many stages."""

    held: Held
    one_stage: bool
