"""Zeros on a device that many calls read, for kernels whose residual is not optional."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_core import _cuda

LEAST = 1 << 20
"""Elements of the smallest buffer."""


class Zeros:
    """One growing buffer of zeros per dtype.

    Args:
        device: Where the buffers are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._outgrown: list[Tensor] = []  # CUDA graphs and other streams may still read them

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, including outgrown ones."""
        return sum(each.nbytes for each in (*self._buffers.values(), *self._outgrown))

    def like(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """Zeros of a tensor's shape and dtype, read-only.

        Returns:
            The zeros, and whether they can be kept. Zeros allocated during the capture of a CUDA graph cannot: they
            are in the graph's memory.
        """
        found = self._buffers.get(tensor.dtype)
        if found is None or found.numel() < tensor.numel():
            if _cuda.is_capturing():
                return torch.zeros_like(tensor), False
            if found is not None:
                self._outgrown.append(found)
            found = self._buffers[tensor.dtype] = self._made(tensor.numel(), tensor.dtype)
        return found[: tensor.numel()].view(tensor.shape), True

    def clear(self) -> None:
        """Give the memory back to torch's allocator."""
        self._buffers.clear()
        self._outgrown.clear()

    def _made(self, elements: int, dtype: torch.dtype) -> Tensor:
        room = max(LEAST, 1 << (elements - 1).bit_length())

        def zeros() -> Tensor:
            made = torch.zeros(room, dtype=dtype, device=self._device)
            _cuda.synchronize(self._device)  # any stream may read them from now on
            return made

        return _cuda.run_on_own_thread(zeros)
