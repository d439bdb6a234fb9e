"""Memory as a kernel sees it: an address and a count, no shapes, no strides, no dtypes."""

import torch
from torch import Tensor

ALIGNMENT = 16


def uninitialised(*shape: int, dtype: torch.dtype) -> Tensor:
    """What ``torch.empty`` gives on a bad day: NaN, or bytes that are no likely result."""
    return torch.empty(shape, dtype=dtype).copy_(_garbage(dtype))


def uninitialised_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, strides included."""
    return torch.empty_like(x).copy_(_garbage(x.dtype))


def read(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` elements from the tensor's address on, as if they were of ``dtype``; NaN beyond its storage."""
    raw = _bytes(x)[: count * dtype.itemsize]
    whole = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].clone().view(dtype)
    return torch.cat([whole, uninitialised(count - whole.numel(), dtype=dtype)])


def write(x: Tensor, values: Tensor) -> None:
    """Lay the values' bytes down from the tensor's address on."""
    raw, target = values.contiguous().flatten().view(torch.uint8), _bytes(x)
    beyond = raw.numel() - target.numel()
    assert beyond <= 0, f"the kernel writes {beyond} bytes beyond the end of a tensor of shape {tuple(x.shape)}"
    target[: raw.numel()] = raw


def spoil(x: Tensor) -> None:
    """Nothing was written here."""
    x.copy_(_garbage(x.dtype))


def rows(x: Tensor, m: int, n: int) -> Tensor:
    """An input as the copy into the registered buffer has it: dense rows of a wider matrix are the one layout it knows.

    Anything else is read in the order of its storage.
    """
    if x.shape == (m, n) and x.stride(-1) == 1 and x.stride(0) >= n:
        return x.flatten()
    return read(x, x.numel(), x.dtype)


def check_aligned(**tensors: Tensor | None) -> None:
    """What the kernels load and store in packs of 16 bytes."""
    for name, x in tensors.items():
        if x is not None and x.data_ptr() % ALIGNMENT:
            raise RuntimeError(f"misaligned address: {name} does not lie on {ALIGNMENT} bytes")


def _bytes(x: Tensor) -> Tensor:
    """The tensor's storage from its first element on."""
    storage, start = x.untyped_storage(), x.storage_offset() * x.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (storage.nbytes() - start,), (1,))


def _garbage(dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return torch.tensor(torch.nan).to(dtype)
    return torch.tensor(0x5A).to(dtype)
