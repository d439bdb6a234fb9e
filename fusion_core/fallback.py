"""State that graphs do not show: operators that fell back to unfused code at run time, and backends' memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from fusion_core.errors import BackendError
from fusion_core.reason import Reason

_fallen_back: dict[tuple[str, str], list[Reason]] = {}
_lock = threading.Lock()


def fell_back(strategy: str, group: str, reason: Reason) -> None:
    """Record that a strategy's operator runs unfused from now on; reports of its sites then show it.

    An operator calls this when it takes its unfused branch for good, e.g. because its workspace could not be made or a
    self-check failed. Each reason is kept once per process, however often it is recorded.

    Args:
        strategy: The strategy's name.
        group: The process group's name.
        reason: Why it runs unfused.

    Raises:
        BackendError: if ``reason`` is not a `Reason`.

    Example:
        >>> fell_back("acme.one_shot", "tp", Reason("workspace", "no memory is left", "64 MiB"))
        >>> print(*fallen_back("acme.one_shot", "tp"))
        no memory is left, needs 64 MiB
    """
    if not isinstance(reason, Reason):
        raise BackendError(f"fell_back of {strategy!r} got {reason!r}, needs a Reason")
    with _lock:
        reasons = _fallen_back.setdefault((strategy, group), [])
        if reason not in reasons:
            reasons.append(reason)


def fallen_back(strategy: str, group: str) -> tuple[Reason, ...]:
    """The reasons why a strategy runs unfused in a process group; empty if it does not."""
    with _lock:
        return tuple(_fallen_back.get((strategy, group), ()))


@dataclass(frozen=True, slots=True)
class Status:
    """One resource that a backend has allocated in this process, or will allocate.

    Attributes:
        subject: What it is: ``"workspace of group 0, 2 ranks, 16-bit"``.
        memory: Bytes of device memory on each rank.
        state: ``"in use"``, ``"not made yet: made at the first call"``, or why it could not be made.

    Raises:
        BackendError: for a value of the wrong type, or a negative ``memory``.
    """

    subject: str
    memory: int
    state: str

    def __post_init__(self) -> None:
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 0:
            raise BackendError(f"memory is {self.memory!r}, needs a whole number of bytes, 0 or more")
        for name in ("subject", "state"):
            if not isinstance(value := getattr(self, name), str):
                raise BackendError(f"{name} is {value!r}, needs text")
