"""FlashInfer's fused all-reduce on NVIDIA GPUs. Importing this imports neither FlashInfer nor its operators."""

from collections.abc import Iterator

from fusion_core import Device, Reason, Status, Strategy, hookimpl
from fusion_flashinfer import availability, strategies


@hookimpl
def fusion_available(device: Device) -> Iterator[Reason]:
    """Why FlashInfer cannot be used on a device. Looks at the installed distribution and never imports it."""
    yield from availability.unavailable(device)


@hookimpl
def fusion_strategies() -> tuple[Strategy, ...]:
    """A strategy for every pattern that FlashInfer has a kernel for."""
    return strategies.STRATEGIES


@hookimpl
def fusion_status(device: Device) -> Iterator[Status]:
    """The workspaces of this process, and why one failed."""
    from fusion_flashinfer.workspaces import WORKSPACES

    yield from WORKSPACES.status()


def release(group: str | None = None) -> None:
    """Give back the GPU memory of one process group's workspaces, or of all.

    The memory is also given back when the process group is destroyed and nothing refers to it. Call this on every rank
    of the group, when no CUDA graph that contains a fused operator is left. The next call makes a new workspace.

    Args:
        group: The process group's name; None for every group.
    """
    from fusion_flashinfer.workspaces import WORKSPACES

    WORKSPACES.release(group)
