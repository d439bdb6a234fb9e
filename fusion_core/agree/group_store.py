"""The part of a process group's store that is this library's: of one group object, and of no fork.

A group's name may come again in one store: torch counts names from the start once all groups are destroyed, and a
launcher's store outlives the processes that it starts again. What an earlier group left there must not be read as a
later one's. So ranks number the groups of a name in the store. A rank that meets a new group takes the newest number,
or the next one where it had that already with an earlier group. How often a rank asks or tries again changes nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from fusion_core.errors import FusionError
from fusion_core.reason import Reason

T = TypeVar("T")

CODE = "agreement"


class NoAgreement(FusionError):
    """The ranks of a group did not all take part, with the reason."""

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
        prefix: What keys begin with in that store.
    """

    def __init__(self, group: dist.ProcessGroup, store: Any, prefix: str) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._whole, self._prefix = store, prefix
        self._store: Any = PrefixStore(prefix, store)
        self._group = group.group_name
        self._process = os.getpid()

    def part(self, name: str) -> GroupStore:
        """The same with keys that begin with a name."""
        found = object.__new__(GroupStore)
        vars(found).update(vars(self))
        found._prefix = f"{self._prefix}/{name}"
        found._store = PrefixStore(found._prefix, self._whole)
        return found

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value.

        Raises:
            NoAgreement: where the store fails, as do all others here.
        """
        self._ask(lambda: self._store.set(key, value))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys have values."""
        return self._ask(lambda: bool(self._store.check(list(keys))))

    def get(self, key: str) -> bytes | None:
        """The value of a key; None where it has none."""
        return self._ask(lambda: bytes(self._store.get(key)) if self._store.check([key]) else None)

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        """Write a value where another one (empty: none) is; what is there then."""
        return self._ask(lambda: bytes(self._store.compare_set(key, expected, wanted)))

    def _ask(self, question: Callable[[], T]) -> T:
        if os.getpid() != self._process:
            raise NoAgreement(_forked(self._group))
        try:
            return question()
        except (RuntimeError, OSError) as error:  # not asked again: an answer may come late, and be taken for the next
            found = f"the store of the group fails ({error})"
            raise NoAgreement(Reason(CODE, found, "a store that all ranks reach")) from error


_met: WeakKeyDictionary[dist.ProcessGroup, GroupStore | None] = WeakKeyDictionary()
_inherited: WeakSet[dist.ProcessGroup] = WeakSet()
_lock = threading.Lock()


def group_store(group: dist.ProcessGroup) -> GroupStore | None:
    """The store of a group; None where it was made without one, which is so on all of its ranks.

    Raises:
        NoAgreement: where the group is destroyed, where its store fails, or where this process is a fork of the one
            that made the group: the two would read each other's answers.
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
        store = dist.distributed_c10d._get_process_group_store(group)
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
    # first, so that one who is interrupted here does not take yet another number
    _met[group] = whole.part(str(number))
    whole.set(mine, str(number))


def _forked(name: str) -> Reason:
    found = f"this process is a fork of the one that made process group {name!r}"
    return Reason("fork", found, "groups of its own", hint="start processes by spawn, or before init_process_group")


def _in_a_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    _inherited.update(list(_met))
    if dist.is_available() and dist.is_initialized():
        _inherited.update(list(dist.distributed_c10d._world.pg_map))


os.register_at_fork(after_in_child=_in_a_fork)
