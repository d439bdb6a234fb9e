"""What all ranks of a group must see alike while they measure: failures, decisions, the slowest rank's times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from fusion_core.groups import group_name

T = TypeVar("T")

LONGEST = 400
"""Characters that are kept of an error's first line."""


class Ranks:
    """The ranks of one process group. Its methods are collective: every rank calls them, in the same order.

    They talk through gloo, which leaves the GPUs alone.

    Args:
        group: The process group that is measured; None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.name = group_name(self.group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        # always a group of their own: what failed before its collective must not meet a peer that is in it
        self._talk = dist.new_group(dist.get_process_group_ranks(self.group), backend="gloo")

    def gather(self, value: T) -> list[T]:
        """The picklable values of all ranks, in rank order."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._talk)
        return values  # type: ignore[return-value]

    def first(self, value: T) -> T:
        """Rank 0's value: what only one can decide, such as whether there is time left."""
        return self.gather(value)[0]

    def meet(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self._talk)

    def attempt(self, work: Callable[[], float]) -> tuple[float, str | None]:
        """Do what may fail on some ranks alone.

        Args:
            work: Gives a number; an exception is a failure.

        Returns:
            The largest number of all ranks and None; or 0 and why it failed, by the first rank on which it did.
        """
        given, error = 0.0, None
        try:
            given = work()
        except (Exception, SystemExit) as caught:  # noqa: BLE001  # whatever a path raises: the others must hear of it
            error = said(caught)
        found = self.gather((given, error))
        for rank, (_, why) in enumerate(found):
            if why is not None:
                return 0.0, f"rank {rank}: {why}"
        return max(number for number, _ in found), None

    def failed(self, mine: Mapping[str, str]) -> dict[str, str]:
        """What failed on any rank, by name, and why by the first rank on which it did."""
        found: dict[str, str] = {}
        for rank, failures in enumerate(self.gather(dict(mine))):
            for name, why in failures.items():
                found.setdefault(name, f"rank {rank}: {why}")
        return found

    def slowest(self, times: Mapping[str, float]) -> dict[str, float]:
        """The largest of all ranks for each name; the names are the same on all ranks."""
        found = self.gather(dict(times))
        return {name: max(each[name] for each in found) for name in times}


def said(error: BaseException) -> str:
    """An error as one short line."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  # its own __str__ raises
        text = type(error).__name__
    return text.splitlines()[0][:LONGEST]
