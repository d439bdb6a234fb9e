"""Exchanges between the ranks of a group while they measure: failures, decisions, the slowest rank's times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from fusion_core.errors import described
from fusion_core.groups import group_name

T = TypeVar("T")

LONGEST = 400
"""The most characters of an error's message."""


class Ranks:
    """The ranks of one process group. Its methods are collective: every rank calls them, in the same order.

    They communicate through gloo, which leaves the GPUs alone.

    Args:
        group: The process group that is measured; None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.name = group_name(self.group)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        # a separate group: a rank that failed before a collective must not pair with a peer inside that collective
        self._cpu_group = dist.new_group(dist.get_process_group_ranks(self.group), backend="gloo")

    def gather(self, value: T) -> list[T]:
        """The picklable values of all ranks, in rank order."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._cpu_group)
        return values  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, for a decision that one rank must make, such as whether there is time left."""
        return self.gather(value)[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._cpu_group)

    def attempt(self, work: Callable[[], float]) -> tuple[float, str | None]:
        """Run work that may fail on only some of the ranks.

        Args:
            work: Returns a number; an exception is a failure.

        Returns:
            The largest number of all ranks and None; or 0 and the error of the first rank that failed.
        """
        given, error = 0.0, None
        try:
            given = work()
        except (Exception, SystemExit) as caught:  # noqa: BLE001  # whatever a path raises, the other ranks must know
            error = message_of(caught)
        found = self.gather((given, error))
        for rank, (_, why) in enumerate(found):
            if why is not None:
                return 0.0, f"rank {rank}: {why}"
        return max(number for number, _ in found), None

    def failed(self, mine: Mapping[str, str]) -> dict[str, str]:
        """The names that failed on any rank → the error of the first rank on which they did."""
        found: dict[str, str] = {}
        for rank, failures in enumerate(self.gather(dict(mine))):
            for name, why in failures.items():
                found.setdefault(name, f"rank {rank}: {why}")
        return found

    def slowest(self, times: Mapping[str, float]) -> dict[str, float]:
        """The largest time of all ranks for each name; all ranks have the same names."""
        found = self.gather(dict(times))
        return {name: max(each[name] for each in found) for name in times}


def message_of(error: BaseException) -> str:
    """An error as one short line."""
    return described(error)[:LONGEST]
