"""The buffers of a communicator, as far as anything outside of it can tell."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IPCBuffer:
    """Memory that peers have opened.

    Attributes:
        data_ptr: Not 0.
        max_size: In bytes.
    """

    data_ptr: int
    max_size: int


def stream_is_capturing() -> bool:
    """Whether the current stream records a graph; a torch without a GPU has no streams, unless a test gives it one."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        return False


def check_registered(inp: Tensor, reg_bytes: int | None) -> None:
    """What the kernels read their peers' memory from.

    Args:
        inp: The input.
        reg_bytes: Of the buffer that it is copied to; None where it is to be read where it lies.

    Raises:
        RuntimeError: It does not fit, or nobody knows its address.
    """
    if reg_bytes is None:
        if not stream_is_capturing():  # while capturing AITER notes the address down, for `capture` to exchange
            raise RuntimeError(f"buffer address {inp.data_ptr()} is not registered!")
    elif inp.numel() * inp.element_size() > reg_bytes:
        raise RuntimeError("registered buffer is too small to contain the input")
