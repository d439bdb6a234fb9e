"""FlashInfer itself, imported when a workspace is first made, and never before."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any


@functools.cache
def comm() -> Any:
    """``flashinfer.comm`` with its kernels built and loaded.

    The first call in a fresh installation compiles them for some minutes, under FlashInfer's own file lock.

    Raises:
        Exception: any that importing or building raises.
    """
    import flashinfer.comm as module
    from flashinfer.comm.trtllm_ar import get_trtllm_comm_module

    get_trtllm_comm_module()
    # its unified function warns at every call about the deprecated function that it calls itself
    warnings.filterwarnings("ignore", message=r"use the unified API allreduce\.py", category=DeprecationWarning)
    return module


def below() -> Callable[..., Any] | None:
    """The function that `flashinfer.comm.allreduce_fusion` calls; None if there is none of this name."""
    from flashinfer.comm.trtllm_ar import get_trtllm_comm_module

    return getattr(get_trtllm_comm_module(), "trtllm_allreduce_fusion", None)


def version() -> str:
    """The installed release."""
    import flashinfer

    return str(flashinfer.__version__)


@functools.cache
def confidential_computing() -> bool:
    """Whether the GPU is in NVIDIA's confidential computing mode, in which FlashInfer's workspace uses multicast."""
    from flashinfer.utils import is_confidential_compute

    return bool(is_confidential_compute())
