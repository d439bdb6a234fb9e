"""The pure-torch backend: every core pattern by its own definition, on any device, dtype and world size.

Under ``torch.compile`` the definition's operators go into the graph, where Inductor fuses them like all others, so
choosing it costs nothing and gains nothing. The backend also has the bare all_reduce over torch's symmetric memory,
used where a table records that it is faster, and in the order of the ranks, for the same bits at every batch size.
"""

from collections.abc import Iterator

from fusion_core import Device, Status, Strategy, hookimpl


@hookimpl
def fusion_strategies() -> Iterator[Strategy]:
    """One strategy for each core pattern, the pattern itself, and two more for the bare all_reduce."""
    from fusion_reference.strategies import strategies

    yield from strategies()


@hookimpl
def fusion_status(device: Device) -> Iterator[Status]:
    """The buffers in symmetric memory of this process, and why one failed."""
    from fusion_reference.buffers import BUFFERS

    yield from BUFFERS.status()


def release(group: str | None = None) -> None:
    """Give back the symmetric memory of one process group, or of all.

    The memory is also given back when the process group is destroyed and nothing refers to it. Call this on every rank
    of the group, when no CUDA graph that contains one of the operators is left. The next call makes a new buffer.

    Args:
        group: The process group's name; None for every group.
    """
    from fusion_reference.buffers import BUFFERS

    BUFFERS.release(group)
