"""One call of an operator, and the workspace that runs it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from fusion_core._torch.distributed import group_by_name
from fusion_core.patterns.definition import Pattern
from fusion_core.workspaces.zeros import Zeros

Handle = TypeVar("Handle")


class Call(NamedTuple):
    """One call of an operator. Everything but the values in the tensors is equal on all ranks of the group.

    Attributes:
        pattern: The pattern that is computed.
        strategy: The name of the strategy that runs it; reports show it.
        tensors: The pattern's tensors by name, without absent ones; ``x`` is ``[..., n]``.
        group: The process group's name.
        scalars: The pattern's scalars by name; one that is missing has its default. Hashable values.
        outputs: The names of the operator's outputs; None for all of the pattern's.
        max_tokens: The largest number of rows of any call, as the user set it; None for no bound.
        kernel: The kernel that will run; unequal to the backend's others, and its `str` is its name. None if a strategy
            has one kernel. Each kernel is checked separately, in each dtype of x, before its first use.
    """

    pattern: Pattern
    strategy: str
    tensors: Mapping[str, Tensor]
    group: str
    scalars: Mapping[str, Any] = MappingProxyType({})
    outputs: tuple[str, ...] | None = None
    max_tokens: int | None = None
    kernel: Hashable = None

    @property
    def x(self) -> Tensor:
        """This rank's part of the sum."""
        return self.tensors["x"]

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group."""
        return group_by_name(self.group)

    @property
    def world_size(self) -> int:
        """The number of ranks of the group."""
        return self.process_group.size()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of x."""
        return self.x.shape[-1] * self.x.element_size()

    def of(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> Call:
        """The same call with other tensors and scalars."""
        rest = self.outputs, self.max_tokens, self.kernel
        return Call(self.pattern, self.strategy, tensors, self.group, scalars, *rest)

    def __str__(self) -> str:
        return f"{self.strategy} of {tuple(self.x.shape)}"


class Workspace(Generic[Handle]):
    """A workspace for calls of one form.

    Attributes:
        handle: The value that `Provider.create` returned.
    """

    __slots__ = ("_all_zeros", "_zeros", "handle")

    def __init__(self, handle: Handle, zeros: Zeros) -> None:
        self.handle = handle
        self._all_zeros = zeros
        self._zeros: Tensor | None = None

    def zeros(self, like: Tensor) -> Tensor:
        """Zeros of a tensor's shape and dtype, read-only, for kernels whose residual is not optional."""
        if self._zeros is None or self._zeros.shape != like.shape or self._zeros.dtype != like.dtype:
            found, lasts = self._all_zeros.like(like)
            if not lasts:
                return found
            self._zeros = found
        return self._zeros
