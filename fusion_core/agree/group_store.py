"""This library's part of a process group's store: one for each group object, and none for a fork.

A group's name can occur twice in one store: torch restarts its count of names once all groups are destroyed, and a
launcher's store outlives the processes that it restarts. A later group must not read what an earlier one left there. So
ranks number the groups of a name in the store. A rank that meets a new group takes the newest number, or the next one
if it used that number for an earlier group. Asking again, or trying again, changes no number.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch.distributed as dist

from fusion_core._torch.distributed import PrefixStore, groups, store_of
from fusion_core.errors import FusionError
from fusion_core.reason import Reason

T = TypeVar("T")

CODE = "agreement"


class NoAgreement(FusionError):
    """Not all ranks of a group took part; ``reason`` is why."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class GroupStore:
    """Keys and values that the ranks of one group share. No call waits for another rank.

    Attributes:
        rank: This process's rank in the group.
        size: The number of ranks.

    Args:
        group: The process group.
        store: Its store.
        prefix: The start of each key in that store.
    """

    def __init__(self, group: dist.ProcessGroup, store: Any, prefix: str) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._whole, self._prefix = store, prefix
        self._store: Any = PrefixStore(prefix, store)
        self._group = group.group_name
        self._process = os.getpid()

    def part(self, name: str) -> GroupStore:
        """The part of this store whose keys begin with a name."""
        found = object.__new__(GroupStore)
        vars(found).update(vars(self))
        found._prefix = f"{self._prefix}/{name}"
        found._store = PrefixStore(found._prefix, self._whole)
        return found

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value.

        Raises:
            NoAgreement: if the store fails. Every method raises it then.
        """
        self._ask(lambda: self._store.set(key, value))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys have values."""
        return self._ask(lambda: bool(self._store.check(list(keys))))

    def get(self, key: str) -> bytes | None:
        """The value of a key; None if it has none."""
        return self._ask(lambda: bytes(self._store.get(key)) if self._store.check([key]) else None)

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        """Write a value if the stored one is ``expected`` (empty: none). Returns the value stored afterwards."""
        return self._ask(lambda: bytes(self._store.compare_set(key, expected, wanted)))

    def _ask(self, question: Callable[[], T]) -> T:
        if os.getpid() != self._process:
            raise NoAgreement(_forked(self._group))
        try:
            return question()
        except (RuntimeError, OSError) as error:  # no retry: a late answer would be taken for that of the next call
            found = f"the store of the group fails ({error})"
            raise NoAgreement(Reason(CODE, found, "a store that all ranks reach")) from error


_met: WeakKeyDictionary[dist.ProcessGroup, GroupStore | None] = WeakKeyDictionary()
_inherited: WeakSet[dist.ProcessGroup] = WeakSet()
_lock = threading.Lock()


def group_store(group: dist.ProcessGroup) -> GroupStore | None:
    """The store of a group; None if the group was created without one, on all of its ranks.

    Raises:
        NoAgreement: if the group is destroyed, its store fails, or this process is a fork of the one that created the
            group: the two would read each other's answers.
    """
    if group in _inherited:
        raise NoAgreement(_forked(group.group_name))
    if group not in _met:
        with _lock:
            if group not in _met:
                _meet(group)
    return _met[group]


def _meet(group: dist.ProcessGroup) -> None:
    try:
        store = store_of(group)
    except KeyError as error:
        reason = Reason(CODE, f"the process group {group.group_name!r} is destroyed", "a living group")
        raise NoAgreement(reason) from error
    if store is None:
        _met[group] = None
        return
    whole = GroupStore(group, store, f"fusion_core/{group.group_name}")
    mine = f"joined/{whole.rank}"
    last = int(whole.get(mine) or 0)
    number = int(whole.compare_set("newest", str(last or ""), str(last + 1)))
    # before the write: a rank that is interrupted here must not take yet another number
    _met[group] = whole.part(str(number))
    whole.set(mine, str(number))


def _forked(name: str) -> Reason:
    found = f"this process is a fork of the one that made process group {name!r}"
    return Reason("fork", found, "groups of its own", hint="start processes by spawn, or before init_process_group")


def _in_a_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    _inherited.update(list(_met))
    _inherited.update(groups())


os.register_at_fork(after_in_child=_in_a_fork)
