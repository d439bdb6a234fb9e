"""AITER's fused all-reduce on AMD GPUs. Importing this imports neither AITER nor its operators."""

import sys
from collections.abc import Iterator

from fusion_aiter import availability, strategies
from fusion_core import Device, Reason, Status, Strategy, hookimpl


@hookimpl
def fusion_available(device: Device) -> Iterator[Reason]:
    """Why AITER cannot be used on a device. Reads its source and never imports it; without ROCm its import raises."""
    yield from availability.unavailable(device)


@hookimpl
def fusion_strategies() -> tuple[Strategy, ...]:
    """A strategy for every pattern that AITER has a kernel for."""
    return strategies.STRATEGIES


@hookimpl
def fusion_status(device: Device) -> Iterator[Status]:
    """The installed AITER, the communicators of this process, and why one failed."""
    from fusion_aiter.communicators import COMMUNICATORS

    if words := availability.installed_release():
        state = "imported" if "aiter" in sys.modules else "not imported yet: imported at the first call"
        yield Status(words, 0, state)
    yield from COMMUNICATORS.status()


def release(group: str | None = None) -> None:
    """Give back the GPU memory of one process group's communicator, or of all.

    Call it on every rank of the group before the group is destroyed: the ranks close the communicator together. No CUDA
    graph that contains a fused operator may be left. The next call makes a new communicator.

    Args:
        group: The process group's name; None for every group.
    """
    from fusion_aiter.communicators import COMMUNICATORS

    COMMUNICATORS.release(group)
