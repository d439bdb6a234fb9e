"""Ranks of one process group agree through the group's store, with a time limit: no collective, so no hang.

What ranks cannot know alone (has the library loaded everywhere, did the workspace come up everywhere) is exchanged
here. A rank that fails or never comes makes all others reach the same outcome, each within the time limit.
"""

from __future__ import annotations

import json
import pickle
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from fusion_core.errors import FusionError
from fusion_core.reason import Reason

ABANDONED = "abandoned"
POLL = 0.005
"""Seconds between two looks at the store. A store that blocked instead would keep out this process's other threads."""
PATIENCE = 30.0
"""Seconds after which one that still waits says for whom."""


class NoAgreement(FusionError):
    """The ranks of a group did not all take part, with the reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Agreement:
    """The ranks of one group on one subject. Every rank must make the same calls in the same order.

    Also what FlashInfer calls a communication backend (``Get_rank``, ``Get_size``, ``allgather``, ``bcast``,
    ``barrier``), for libraries that exchange handles between ranks.

    Args:
        group: The process group.
        subject: Says what is agreed on, in messages too; the same on all ranks, and new for each `Agreement`
            between the same ranks.
        timeout: Seconds that a step waits for the other ranks.
        names: What the ranks are called in messages; None for their numbers in the group.

    Raises:
        NoAgreement: where the group has no store to agree through.
    """

    def __init__(
        self, group: dist.ProcessGroup, subject: str, timeout: float, names: Sequence[object] | None = None
    ) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.subject = subject
        self.timeout = timeout
        self.names = range(self.size) if names is None else names
        self._step = 0
        try:
            store = dist.distributed_c10d._get_process_group_store(group)
        except KeyError as error:
            raise NoAgreement(Reason("agreement", f"the group of {subject} is destroyed", "a living group")) from error
        if store is None:
            raise NoAgreement(Reason("agreement", f"the group of {subject} has no store", "a group made with one"))
        self._store: Any = PrefixStore(f"fusion_core/{group.group_name}/{subject}", store)

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in rank order.

        Raises:
            NoAgreement: where a rank's value does not come in time, or it has left; the reason names the ranks.
        """
        self._step += 1
        keys = [f"{self._step}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], pickle.dumps(value))
        arrived = self._wait(lambda: self._store.check(keys) or self._store.check([ABANDONED]), keys)
        if not arrived:
            raise NoAgreement(self._missing(keys))
        if not self._store.check(keys):
            raise NoAgreement(Reason(**json.loads(self._store.get(ABANDONED))))
        return [pickle.loads(self._store.get(key)) for key in keys]

    def abandon(self, reason: Reason) -> None:
        """Have the `gather` of every rank that still waits for this one raise `NoAgreement` at once."""
        self._store.set(ABANDONED, json.dumps(self._ours(reason).to_dict()))

    def outcome(self, failure: Reason | NoAgreement | None) -> Reason | None:
        """None where no rank has a failure; else the first failure that a rank reported, the same one on all ranks.

        A `NoAgreement` is what this rank heard of another one, and is handed on as it stands: the reason names the rank
        that failed, whoever is here first.

        A rank that does not report in time is a failure too. Whoever is first to know settles the outcome in one
        atomic write, so that a late rank cannot come to another one.
        """
        self._step += 1
        decision = f"{self._step}/decision"
        keys = [f"{self._step}/{rank}" for rank in range(self.size)]
        if failure is not None:  # before the others can see this rank: they would settle that all agree
            self._settle(decision, failure.reason if isinstance(failure, NoAgreement) else self._ours(failure))
        self._store.set(keys[self.rank], b"here")
        return self._decide(decision, keys)

    def publish(self, value: Any) -> None:
        """Give a value of plain JSON types to a `collect` that follows; does not wait."""
        self._step += 1
        self._store.set(f"{self._step}/{self.rank}", json.dumps(value))

    def collect(self, end: float | None = None) -> list[Any] | Reason:
        """What every rank published, in rank order; a reason, the same on all ranks, where one did not in time.

        Args:
            end: When waiting ends, by `time.monotonic`; None for the time limit from now on.
        """
        keys = [f"{self._step}/{rank}" for rank in range(self.size)]
        failure = self._decide(f"{self._step}/decision", keys, end)
        return [json.loads(self._store.get(key)) for key in keys] if failure is None else failure

    def _decide(self, decision: str, keys: Sequence[str], end: float | None = None) -> Reason | None:
        """Wait for all keys or for the decision; the one that stands in the end."""
        arrived = self._wait(lambda: self._store.check([decision]) or self._store.check(keys), keys, end)
        settled = self._settle(decision, None if arrived else self._missing(keys))
        return None if settled == "agreed" else Reason(**json.loads(settled))

    def _settle(self, decision: str, failure: Reason | None) -> str:
        """Write the outcome unless there is one; what stands there then."""
        text = "agreed" if failure is None else json.dumps(failure.to_dict())
        settled: bytes = self._store.compare_set(decision, "", text)
        return settled.decode()

    def _ours(self, reason: Reason) -> Reason:
        return replace(reason, found=f"rank {self.rank}: {reason.found}")

    def _wait(self, done: Callable[[], bool], keys: Sequence[str], end: float | None = None) -> bool:
        start = time.monotonic()
        end = start + self.timeout if end is None else end
        silent = True
        while not done():
            now = time.monotonic()
            if now > end:
                return False
            if silent and now > start + PATIENCE:
                silent = False
                words = f"waiting for rank {self._absent(keys)} in {self.subject}, {end - now:.0f} s more at most"
                warnings.warn(f"fusion_core: {words}", RuntimeWarning, stacklevel=4)
            time.sleep(POLL)
        return True

    def _absent(self, keys: Sequence[str]) -> str:
        return ", ".join(str(name) for name, key in zip(self.names, keys, strict=True) if not self._store.check([key]))

    def _missing(self, keys: Sequence[str]) -> Reason:
        absent, limit = self._absent(keys), timedelta(seconds=self.timeout)
        found = f"rank {absent} did not take part in {self.subject} within {limit}"
        return Reason("agreement", found, "every rank of the group to run the same graphs in the same order")

    def Get_rank(self) -> int:
        """This process's rank in the group."""
        return self.rank

    def Get_size(self) -> int:
        """The number of ranks in the group."""
        return self.size

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """`gather` as a tuple."""
        return tuple(self.gather(data))

    def bcast(self, data: Any, root: int) -> Any:
        """The value of rank ``root``."""
        return self.gather(data if self.rank == root else None)[root]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)


def disagreement(ranks: Sequence[dict[str, Any]], same: Sequence[str], needs: str) -> Reason | None:
    """Why ranks cannot share memory between their GPUs, by the facts that each of them gave.

    Args:
        ranks: The facts of each rank, among them ``host`` and ``gpu`` (None where there is none).
        same: Names of facts that must be equal.
        needs: What would do where one of these is not, as a phrase.
    """
    for name in same:
        values = [rank[name] for rank in ranks]
        if other := next((index for index, value in enumerate(values) if value != values[0]), None):
            found = f"{name} is {values[0]!r} on rank 0 and {values[other]!r} on rank {other}"
            return Reason("agreement", found, needs)
    if len({rank["host"] for rank in ranks}) > 1:
        return Reason("hosts", "the group's ranks are on several hosts", "one host, with its GPUs linked")
    gpus = [rank["gpu"] for rank in ranks if rank["gpu"] is not None]
    if len(set(gpus)) < len(gpus):
        return Reason("device", "two ranks use one GPU", "a GPU for each rank", hint="call torch.cuda.set_device first")
    return None
