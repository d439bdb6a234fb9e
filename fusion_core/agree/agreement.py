"""Agreement between a process group's ranks through its store, with a time limit: no collective, so no hang.

Ranks exchange here what no rank can know alone: whether every rank has loaded the library, whether every rank has its
workspace. If a rank fails or never arrives, all others reach the same outcome, each within the time limit.

Each step has one outcome, written atomically. A rank that is interrupted in a step and repeats it, with the same
`Agreement` or another one of the same subject, finds the stored outcome. If a rank's own store fails before the others
can have seen this rank, the step ends with a reason: the others will go on without it. If the store fails later, the
rank cannot know what the others agreed on, and `NoAgreement` is raised.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fusion_core._json.values import parse
from fusion_core.agree.group_store import CODE, GroupStore, NoAgreement, group_store
from fusion_core.errors import BackendError
from fusion_core.reason import Reason

__all__ = ["Agreement", "NoAgreement", "disagreement"]

ABANDONED = "abandoned"
POLL = 0.005
"""Seconds between two polls of the store. A blocking call would keep out this process's other threads."""
PATIENCE = 30.0
"""Seconds after which a rank that still waits warns and names the ranks that it waits for."""


UNREADABLE = object()
"""In place of a value that is not JSON."""


def plain(text: bytes) -> Any:
    """A value of plain JSON types that another rank wrote; `UNREADABLE` if it is not JSON."""
    try:
        return parse(text)
    except ValueError:
        return UNREADABLE


def reason_of(text: bytes) -> Reason:
    """The reason that another rank wrote; if it cannot be read, a reason that reports this."""
    try:
        return Reason(**plain(text))
    except (TypeError, BackendError):  # not an object, unknown names, values that are not text
        return Reason(CODE, "a rank gave a reason that cannot be read", "the same fusion_core on every rank")


class Waiting:
    """One wait for other ranks.

    Args:
        subject: What the wait is for, as a phrase.
        end: When it ends, by `time.monotonic`.
        absent: Returns the names of the ranks that have not arrived.
    """

    def __init__(self, subject: str, end: float, absent: Callable[[], Sequence[object]]) -> None:
        self._subject, self._end, self._absent = subject, end, absent
        self._start = time.monotonic()
        self._silent = True

    def over(self, limit: float) -> Reason | None:
        """Wait briefly. Returns the reason to stop waiting, or None to go on.

        Args:
            limit: The whole time limit in seconds, for the message.
        """
        now = time.monotonic()
        if now > self._end:
            found = f"rank {self._names()} did not take part in {self._subject} within {timedelta(seconds=limit)}"
            return Reason(CODE, found, "every rank of the group to run the same graphs in the same order")
        if not threading.main_thread().is_alive():  # Python joins its threads at exit, and the result is not needed
            found = f"a process ended while it waited for rank {self._names()} in {self._subject}"
            return Reason(CODE, found, "every rank of the group to run the same graphs in the same order")
        if self._silent and now > self._start + PATIENCE:
            self._silent = False
            words = f"waiting for rank {self._names()} in {self._subject}, {self._end - now:.0f} s more at most"
            warnings.warn(f"fusion_core: {words}", RuntimeWarning, stacklevel=4)
        time.sleep(POLL if now < self._start + 1 else 4 * POLL)
        return None

    def _names(self) -> str:
        return ", ".join(map(str, self._absent()))


class Agreement:
    """Agreement of one group's ranks on one subject. Every rank must make the same calls in the same order.

    Also implements what FlashInfer calls a communication backend (``Get_rank``, ``Get_size``, ``allgather``, ``bcast``,
    ``barrier``), for libraries that exchange handles between ranks.

    In a group without a store, ranks cannot exchange anything. `outcome` and `collect` then return the reason and
    `gather` raises it, on every rank.

    Args:
        group: The process group.
        subject: What is agreed on, also used in messages. The same on all ranks, and new for each `Agreement` between
            the same ranks, unless it retries an earlier one.
        timeout: Seconds that a step waits for the other ranks.
        names: The names of the ranks in messages; None for their numbers in the group.

    Raises:
        NoAgreement: if the group is destroyed, its store fails, or this process is a fork of the one that created it.
    """

    def __init__(
        self, group: dist.ProcessGroup, subject: str, timeout: float, names: Sequence[object] | None = None
    ) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.subject = subject
        self.timeout = timeout
        self.names = range(self.size) if names is None else names
        self._step = 1
        store = group_store(group)
        self._store: GroupStore | None = None if store is None else store.part(subject)

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in rank order.

        Raises:
            NoAgreement: if a value does not arrive in time, or a rank called `abandon`; the reason names the ranks.
        """
        store = self._needed()
        self._give(store, pickle.dumps(value))
        failure = self._decide(store, may_leave=True)
        values = self._given(store) if failure is None else []
        self._step += 1
        if failure is not None:
            raise NoAgreement(failure)
        return [self._loaded(rank, value) for rank, value in enumerate(values)]

    def abandon(self, reason: Reason) -> None:
        """Make the `gather` of every rank that still waits for this one raise `NoAgreement` at once."""
        if self._store is not None:
            self._store.set(ABANDONED, json.dumps(self._ours(reason).to_dict()))

    def outcome(self, failure: Reason | NoAgreement | None) -> Reason | None:
        """None if no rank has a failure; else the first failure that a rank reported, the same one on all ranks.

        A `NoAgreement` already names the rank that failed. It is passed on unchanged, whichever rank reports it first.

        A rank that does not report in time is a failure too. The first rank that finds this out writes the outcome
        atomically, so that a late rank cannot reach another one.

        Raises:
            NoAgreement: if the store fails once the others have seen this rank, or if this rank has a failure now and
                had none when it was interrupted in the same step.
        """
        if self._store is None:
            return self._storeless
        reason = failure.reason if isinstance(failure, NoAgreement) else failure and self._ours(failure)
        settled = None
        try:
            if reason is not None:  # before the others can see this rank: they would decide that all agree
                settled = self._settle(self._store, reason)
            self._give(self._store, b"here")
        except NoAgreement as error:
            if error.reason.code != CODE:
                raise
            self._step += 1
            return settled or reason or error.reason
        found = self._decide(self._store)
        self._step += 1
        if reason is not None and found is None:
            raise NoAgreement(reason)
        return found

    def publish(self, value: Any) -> None:
        """Publish a value of plain JSON types for the `collect` that follows. Does not wait."""
        if self._store is not None:
            self._give(self._store, json.dumps(value).encode())

    def collect(self, end: float | None = None) -> list[Any] | Reason:
        """The values that all ranks published, in rank order; a reason, the same on all ranks, if one is late.

        Args:
            end: When waiting ends, by `time.monotonic`; None for the time limit from now on.
        """
        if self._store is None:
            return self._storeless
        failure = self._decide(self._store, end)
        values = self._given(self._store) if failure is None else []
        self._step += 1
        if failure is not None:
            return failure
        found = [plain(value) for value in values]
        if UNREADABLE in found:
            name = self.names[found.index(UNREADABLE)]
            return Reason(CODE, f"rank {name} gave what is no JSON", "the same fusion_core on every rank")
        return found

    @property
    def _storeless(self) -> Reason:
        return Reason(CODE, f"the group of {self.subject} has no store", "a group made with one")

    def _needed(self) -> GroupStore:
        if self._store is None:
            raise NoAgreement(self._storeless)
        return self._store

    def _keys(self) -> list[str]:
        return [f"{self._step}/{rank}" for rank in range(self.size)]

    def _give(self, store: GroupStore, value: bytes) -> None:
        """Write this rank's value of the step. A value from before an interruption stays: others may have read it."""
        key = self._keys()[self.rank]
        if not store.check([key]):
            store.set(key, value)

    def _given(self, store: GroupStore) -> list[bytes]:
        return [store.get(key) or b"" for key in self._keys()]

    def _loaded(self, rank: int, value: bytes) -> Any:
        try:
            return pickle.loads(value)
        except Exception as error:  # another release's classes fail in any way
            found = (
                f"what rank {self.names[rank]} gave in {self.subject} cannot be read ({type(error).__name__}: {error})"
            )
            raise NoAgreement(Reason(CODE, found, "the same libraries on every rank")) from error

    def _decide(self, store: GroupStore, end: float | None = None, *, may_leave: bool = False) -> Reason | None:
        """Wait for the values of all ranks or for a decision. Returns the stored decision: a reason, or None.

        Args:
            store: The group's store, or the part of it for this subject.
            end: When waiting ends, by `time.monotonic`; None for the time limit from now on.
            may_leave: Whether the `abandon` of a rank ends the wait.
        """
        keys, decision = self._keys(), f"{self._step}/decision"
        left = [ABANDONED] if may_leave else []
        problem = self._wait(
            lambda: store.check([decision]) or store.check(keys) or (may_leave and store.check(left)), end, store
        )
        if problem is None and not store.check(keys) and may_leave and (text := store.get(ABANDONED)):
            problem = reason_of(text)
        return self._settle(store, problem)

    def _settle(self, store: GroupStore, failure: Reason | None) -> Reason | None:
        """Write the outcome if none exists (compare-and-set). Returns the stored outcome."""
        text = "agreed" if failure is None else json.dumps(failure.to_dict())
        settled = store.compare_set(f"{self._step}/decision", "", text)
        return None if settled == b"agreed" else reason_of(settled)

    def _ours(self, reason: Reason) -> Reason:
        return replace(reason, found=f"rank {self.rank}: {reason.found}")

    def _wait(self, done: Callable[[], bool], end: float | None, store: GroupStore) -> Reason | None:
        """Wait until ``done`` returns true. Returns the reason if the wait ends before that."""
        end = time.monotonic() + self.timeout if end is None else end
        waiting = Waiting(self.subject, end, lambda: self._absent(store))
        while not done():
            if problem := waiting.over(self.timeout):
                return problem
        return None

    def _absent(self, store: GroupStore) -> list[object]:
        return [name for name, key in zip(self.names, self._keys(), strict=True) if not store.check([key])]

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
        """Wait for every rank."""
        self.gather(None)


def disagreement(ranks: Sequence[dict[str, Any]], same: Sequence[str], needs: str) -> Reason | None:
    """The reason why ranks cannot share memory between their GPUs, from the facts of each rank; None if they can.

    Args:
        ranks: The facts of each rank, among them ``host`` and ``gpu`` (None without a GPU).
        same: Names of the facts that must be equal.
        needs: What is needed where one of these differs, as a phrase.
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
