"""The exchange of facts between the ranks of one group. Each rank may ask in its own order.

A rank publishes its facts under their hash, without waiting. To agree on some facts of its own, it needs to know one of
two things of each other rank: that it has published the same facts, or that it has others and waits here with them. The
outcome is a line in a log that the ranks share. A line has one hash for each rank and is one atomic write at the log's
end. It is the outcome for these hashes, on all ranks and for good. So ranks may ask in any order, ask again after an
interruption, and ask about facts that the others never ask about.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fusion_core._json import shapes
from fusion_core.agree.agreement import UNREADABLE, Waiting, plain, reason_of
from fusion_core.agree.group_store import GroupStore, NoAgreement
from fusion_core.reason import Reason

SUBJECT = "the exchange of facts"
MOMENT = 1.0
"""Seconds after which a rank that waits counts as stuck: the others may wait for this one, in other groups."""


_TEXTS = shapes.listed(shapes.text)
_LINE = shapes.names_with(hashes=shapes.listed(shapes.text_or_none), reason=shapes.anything)


@dataclass(frozen=True)
class Line:
    """One outcome.

    Attributes:
        hashes: The hash of each rank's facts; None for a rank that did not take part.
        reason: Why the ranks have not agreed; None if all took part.
    """

    hashes: tuple[str | None, ...]
    reason: Reason | None

    @classmethod
    def of(cls, text: bytes, size: int) -> Line:
        """The line of ``size`` ranks that a text contains; an empty line if another release wrote another form."""
        given = plain(text)
        if _LINE(given) or len(given["hashes"]) != size:
            return cls((), None)
        reason = given["reason"]
        return cls(tuple(given["hashes"]), None if reason is None else reason_of(json.dumps(reason).encode()))

    def __str__(self) -> str:
        return json.dumps({"hashes": self.hashes, "reason": None if self.reason is None else self.reason.to_dict()})


class Exchange:
    """The exchange of facts in one group.

    Args:
        store: The group's store.
        names: The names of the ranks in messages.
    """

    def __init__(self, store: GroupStore, names: Sequence[object]) -> None:
        self._store = store.part(SUBJECT)
        self._rank, self._size = store.rank, store.size
        self._names = names
        self._published: set[str] = set()
        self._asked: list[str] = []
        self._lines = 0
        self._settled: dict[str, Line] = {}
        self._lock = threading.Lock()

    def publish(self, hash_: str, facts: Any) -> None:
        """Publish this rank's facts to the other ranks. Does not wait.

        Args:
            hash_: The hash of the facts: equal on ranks with equal facts.
            facts: A value of plain JSON types.

        Raises:
            NoAgreement: if the store fails. No rank has the facts then.
        """
        if hash_ not in self._published:
            self._store.set(f"facts/{self._rank}/{hash_}", json.dumps(facts))
            self._published.add(hash_)

    def settle(
        self, hash_: str, end: float, limit: float, stuck: Callable[[], None] = lambda: None
    ) -> list[Any] | Reason | None:
        """The outcome for facts that were published here.

        Args:
            hash_: The hash of these facts.
            end: When waiting ends, by `time.monotonic`.
            limit: The whole time limit in seconds, for the message.
            stuck: Called once if another rank makes this one wait longer than `MOMENT`.

        Returns:
            None if all ranks have these facts; the facts of each rank, by rank, if they differ (`UNREADABLE` for facts
            that are not JSON); a reason if a rank did not take part.

        Raises:
            NoAgreement: if the store fails: the outcome of the others is then unknown.
        """
        line = self._line(hash_) or self._step(hash_, None)
        if line is None:
            with self._asking(hash_):
                line = self._waited_for(hash_, end, limit, stuck)
        if line.reason is not None:
            return line.reason
        if len(set(line.hashes)) == 1:
            return None
        given = [self._store.get(f"facts/{rank}/{each}") for rank, each in enumerate(line.hashes)]
        return [UNREADABLE if text is None else plain(text) for text in given]

    def _waited_for(self, hash_: str, end: float, limit: float, stuck: Callable[[], None]) -> Line:
        waiting = Waiting(SUBJECT, end, lambda: self._absent(hash_))
        problem, moment = None, time.monotonic() + MOMENT
        while (line := self._line(hash_) or self._step(hash_, problem)) is None:
            if time.monotonic() > moment:
                moment = math.inf
                stuck()
            problem = waiting.over(limit)
        return line

    def _absent(self, hash_: str) -> list[object]:
        return [name for name, each in zip(self._names, self._hashes(hash_), strict=True) if each is None]

    def _step(self, hash_: str, problem: Reason | None) -> Line | None:
        """Write a line for this hash if all ranks took part or there is a problem. Returns the hash's line, if any."""
        number = self._lines  # of the next line, taken first: the hashes below are then no older than the log
        hashes = self._hashes(hash_)
        if problem is None and None in hashes:
            return None
        line = Line(tuple(hashes), problem if None in hashes else None)
        self._store.compare_set(f"log/{number}", "", str(line))
        return self._line(hash_)

    def _line(self, hash_: str) -> Line | None:
        """The line that is the outcome for a hash, or None."""
        while (found := self._settled.get(hash_)) is None:
            number = self._lines
            if (text := self._store.get(f"log/{number}")) is None:
                return None
            line = Line.of(text, self._size)
            with self._lock:
                if number == self._lines:  # no other thread has read it
                    for each in line.hashes:
                        if each is not None:
                            self._settled.setdefault(each, line)
                    self._lines += 1
        return found

    def _hashes(self, hash_: str) -> list[str | None]:
        """The hash of each rank's facts; None where it is not known yet."""
        return [hash_ if rank == self._rank else self._of(rank, hash_) for rank in range(self._size)]

    def _of(self, rank: int, hash_: str) -> str | None:
        """Another rank's hash: one that it waits with here, or this one if it has published that; else None."""
        asked = plain(self._store.get(f"asked/{rank}") or b"[]")
        waits: list[str] = [each for each in asked if each not in self._settled] if not _TEXTS(asked) else []
        if waits and hash_ not in waits:
            return waits[0]
        return hash_ if self._store.check([f"facts/{rank}/{hash_}"]) else None

    @contextmanager
    def _asking(self, hash_: str) -> Iterator[None]:
        """Show the other ranks that this one waits with this hash."""
        try:
            with self._lock:
                self._asked.append(hash_)
                self._store.set(f"asked/{self._rank}", json.dumps(self._asked))
            yield
        finally:
            with self._lock, suppress(NoAgreement, ValueError):
                self._asked.remove(hash_)
                self._store.set(f"asked/{self._rank}", json.dumps(self._asked))
