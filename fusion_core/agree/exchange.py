"""What the ranks of one group tell each other of themselves, in whatever order each of them asks.

A rank publishes its facts under their hash; it waits for nobody. To settle what the ranks have in common by some facts
of its own, it needs to know of each other rank that it has the same, and has published them, or that it has others, and
waits here with them. What is settled is a line in a log that the ranks share. A line has one hash for each rank and is
one atomic write at the log's end. It settles these hashes for all ranks and for good. So it does not matter in which
order ranks ask, who is interrupted and asks again, or who asks for something that the others never do.
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

from fusion_core.agree.agreement import UNREADABLE, Waiting, plain, reason_of
from fusion_core.agree.group_store import GroupStore, NoAgreement
from fusion_core.reason import Reason

SUBJECT = "the exchange of facts"
MOMENT = 1.0
"""Seconds after which a rank that waits is stuck: the others may wait for this one, in other groups."""


@dataclass(frozen=True)
class Line:
    """One outcome.

    Attributes:
        hashes: Of the facts that each rank has; None for one that did not take part.
        reason: Why the ranks have nothing in common; None where all took part.
    """

    hashes: tuple[str | None, ...]
    reason: Reason | None

    @classmethod
    def of(cls, text: bytes, size: int) -> Line:
        """A line of so many ranks as it is written; an empty one where another release wrote it otherwise."""
        given = plain(text)
        hashes, reason = (given.get("hashes"), given.get("reason")) if isinstance(given, dict) else (None, None)
        if not isinstance(hashes, list) or len(hashes) != size:
            return cls((), None)
        if not _is_list_of_text([each for each in hashes if each is not None]):
            return cls((), None)
        return cls(tuple(hashes), None if reason is None else reason_of(json.dumps(reason).encode()))

    def __str__(self) -> str:
        return json.dumps({"hashes": self.hashes, "reason": None if self.reason is None else self.reason.to_dict()})


class Exchange:
    """The exchange of facts in one group.

    Args:
        store: The group's store.
        names: What the ranks are called in messages.
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
        """Tell the other ranks what this one has; does not wait.

        Args:
            hash_: Of the facts: equal on ranks that have the same.
            facts: Of plain JSON types.

        Raises:
            NoAgreement: where the store fails. No rank has the facts then.
        """
        if hash_ not in self._published:
            self._store.set(f"facts/{self._rank}/{hash_}", json.dumps(facts))
            self._published.add(hash_)

    def settle(
        self, hash_: str, end: float, limit: float, stuck: Callable[[], None] = lambda: None
    ) -> list[Any] | Reason | None:
        """The outcome for facts that were published here.

        Args:
            hash_: Of these facts.
            end: When waiting ends, by `time.monotonic`.
            limit: The whole time in seconds, for the message.
            stuck: Called once where another rank makes this one wait longer than a moment.

        Returns:
            None where all ranks have these facts; what each rank has, by rank, where they differ (`UNREADABLE` where it
            is no JSON); a reason where a rank did not take part.

        Raises:
            NoAgreement: where the store fails: the others may have settled anything.
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
        """Write a line for this hash where all ranks took part, or where there is a problem; the one there is then."""
        number = self._lines  # of the first line that may be written: what is read below is of this moment, or later
        hashes = self._hashes(hash_)
        if problem is None and None in hashes:
            return None
        line = Line(tuple(hashes), problem if None in hashes else None)
        self._store.compare_set(f"log/{number}", "", str(line))
        return self._line(hash_)

    def _line(self, hash_: str) -> Line | None:
        """The line that settles a hash, where there is one."""
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
        """What each rank has, as far as it can be known by now."""
        return [hash_ if rank == self._rank else self._of(rank, hash_) for rank in range(self._size)]

    def _of(self, rank: int, hash_: str) -> str | None:
        """What another rank waits with here; else what it has published, if that is the same."""
        asked = plain(self._store.get(f"asked/{rank}") or b"[]")
        waits: list[str] = [each for each in asked if each not in self._settled] if _is_list_of_text(asked) else []
        if waits and hash_ not in waits:
            return waits[0]
        return hash_ if self._store.check([f"facts/{rank}/{hash_}"]) else None

    @contextmanager
    def _asking(self, hash_: str) -> Iterator[None]:
        """Let the others see that this rank waits with this."""
        try:
            with self._lock:
                self._asked.append(hash_)
                self._store.set(f"asked/{self._rank}", json.dumps(self._asked))
            yield
        finally:
            with self._lock, suppress(NoAgreement, ValueError):
                self._asked.remove(hash_)
                self._store.set(f"asked/{self._rank}", json.dumps(self._asked))


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
