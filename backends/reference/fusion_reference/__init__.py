"""The pure-torch backend: every core pattern by its own definition, on any device, dtype and world size.

Under ``torch.compile`` the definition is put into the graph operator by operator, where Inductor fuses it as it fuses
everything else: choosing it costs nothing and gains nothing. Beside that, the bare all_reduce over torch's symmetric
memory, where a table says that it is faster, and in the order of the ranks, for the same bits at every batch size.
"""

from collections.abc import Iterator

from fusion_core import Device, Status, Strategy, hookimpl


@hookimpl
def fusion_strategies() -> Iterator[Strategy]:
    """One strategy for each core pattern, the pattern itself; and three more for the bare all_reduce."""
    from fusion_reference.strategies import strategies

    yield from strategies()


@hookimpl
def fusion_status(device: Device) -> Iterator[Status]:
    """The buffers in symmetric memory of this process, and what made one fail."""
    from fusion_reference.buffers import BUFFERS

    yield from BUFFERS.status()


def release(group: str | None = None) -> None:
    """Give back the symmetric memory of one process group, or of all.

    It also goes back when the process group is destroyed and nothing refers to it any more. Call it on every rank of
    the group, when no CUDA graph that holds one of the operators is left; the next call makes a buffer anew.

    Args:
        group: The process group's name; None for every group.
    """
    from fusion_reference.buffers import BUFFERS

    BUFFERS.groups.release(group)
