"""What AITER's Python checks before a kernel is called."""

import os

from torch import Tensor

DEFAULT_MAX_SIZE = 64 << 20
WAVEFRONT = 64


def max_custom_size(pool_size: int) -> int:
    """``AITER_CUSTOM_AR_MAX_SIZE`` in bytes: 0 is off; what is no number, negative or above the pool means 64 MiB."""
    wanted = _environment("AITER_CUSTOM_AR_MAX_SIZE")
    return DEFAULT_MAX_SIZE if wanted is None or wanted > pool_size else wanted


def min_custom_size() -> int:
    """``AITER_CUSTOM_AR_MIN_SIZE`` in bytes: only what is larger is taken."""
    return _environment("AITER_CUSTOM_AR_MIN_SIZE") or 0


def is_weak_contiguous(x: Tensor) -> bool:
    """Contiguous, or at least filling its storage to the end: true of a transposed tensor, which no kernel reads so."""
    left = x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()
    return x.is_contiguous() or left == x.numel() * x.element_size()


def check_group_size(group_size: int, element_size: int, n: int) -> None:
    """The groups that the shuffles of the FP8 kernels can reduce.

    Raises:
        TypeError: It is no int.
        ValueError: It is none of those, or does not divide a row.
    """
    if not isinstance(group_size, int):
        raise TypeError(f"per-group quant group_size must be int, got {type(group_size).__name__}")
    pack = 16 // element_size
    if group_size <= 0:
        problem = "group_size > 0"
    elif group_size % pack:
        problem = f"group_size divisible by PACK_SIZE={pack}"
    elif (threads := group_size // pack) & (threads - 1):
        problem = "group_size/PACK_SIZE to be a power of two"
    elif threads > WAVEFRONT:
        problem = f"group_size/PACK_SIZE <= {WAVEFRONT}"
    elif n % group_size:
        problem = "n divisible by group_size"
    else:
        return
    raise ValueError(f"per-group quant requires {problem}, got {group_size=} {n=}")


def check_mxfp4_width(n: int, element_size: int) -> None:
    """Whole blocks of 32.

    Raises:
        ValueError: They are not.
    """
    if n <= 0 or n % 32 or n % (16 // element_size):
        raise ValueError(f"MXFP4 fused quant requires n > 0 divisible by 32, got n={n}")


def _environment(name: str) -> int | None:
    try:
        value = int(os.environ.get(name, "").strip())
    except ValueError:
        return None
    return value if value >= 0 else None
