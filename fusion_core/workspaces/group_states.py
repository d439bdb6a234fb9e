"""A backend's state in this process for each process group. Its memory is given back when the group is gone."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist

from fusion_core import _cuda
from fusion_core._torch.distributed import group_by_name
from fusion_core.agree.agreement import Agreement
from fusion_core.workspaces.call import Handle
from fusion_core.workspaces.provider import Provider
from fusion_core.workspaces.state import GroupState

T = TypeVar("T")

MOST_FORMS = 4096
"""The number of call forms that are remembered; a server with run-time token counts has many."""


class GroupStates(Generic[Handle]):
    """A backend's group states by key.

    Attributes:
        forms: Form of a call → what was decided for it; cleared when a state is dropped or changed.

    Args:
        provider: The backend's provider.
    """

    def __init__(self, provider: Provider[Handle]) -> None:
        self.forms: dict[Any, Any] = {}
        self._provider = provider
        self._states: dict[tuple[Any, ...], GroupState[Handle]] = {}
        self._numbers: WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = WeakKeyDictionary()
        self._in_a_new_process()
        _all.add(self)

    def _in_a_new_process(self) -> None:
        self._changing = threading.RLock()
        self._lock = threading.Lock()
        self._preparing: dict[str, threading.Lock] = {}

    def __iter__(self) -> Iterator[GroupState[Handle]]:
        """The states of groups that still exist."""
        self._sweep()
        return iter(list(self._states.values()))

    def get(self, key: tuple[Any, ...], device: torch.device) -> GroupState[Handle]:
        """The state of a key; a new one if there is none or its group is gone."""
        state = self._states.get(key)
        return state if state is not None and state.alive else self._open(key, device)

    def _open(self, key: tuple[Any, ...], device: torch.device) -> GroupState[Handle]:
        self._sweep()
        with self._changing:
            group = group_by_name(key[0])
            state = GroupState(key, weakref.ref(group), group.size(), device, self._provider)
            self._states[key] = state
            weakref.finalize(group, _forget, weakref.ref(self), key).atexit = False
            return state

    def remember(self, form: Any, decided: Any) -> None:
        """Record in `forms` what was decided for a form."""
        if len(self.forms) >= MOST_FORMS:
            self.forms.clear()
        self.forms[form] = decided

    def prepare(self, state: GroupState[Handle], work: Callable[[], T]) -> T:
        """Run work that all ranks of a group do together, see `run_on_own_thread`; one at a time per group."""
        with self._lock:
            lock = self._preparing.setdefault("" if self._provider.one_at_a_time else state.name, threading.Lock())
        return _cuda.run_on_own_thread(work, lock)

    def agreement(self, state: GroupState[Handle], subject: str, timeout: float) -> Agreement:
        """A fresh agreement between the ranks of a group.

        Args:
            state: A state of the group.
            subject: What is agreed on, as a phrase.
            timeout: Seconds that a step waits for the other ranks.
        """
        group = state.group()
        assert group is not None
        return Agreement(group, self.numbered(group, subject), timeout)

    def numbered(self, group: dist.ProcessGroup, subject: str) -> str:
        """The subject of an agreement with a sequence number, since the same subject can recur."""
        with self._lock:
            # counted per subject: a step that only one rank needs does not shift the numbers of other subjects
            number = self._numbers.setdefault(group, Counter())[subject]
            self._numbers[group][subject] += 1
        return f"{subject} ({self._provider.name}, step {number})"

    def release(self, group: str | None = None) -> None:
        """Give back the memory of one group, or of all. CUDA graphs that use it must be gone."""
        with self._changing:
            for key in [key for key in self._states if group in (None, key[0])]:
                self._drop(key)

    def _sweep(self) -> None:
        """Give back the memory of destroyed groups: torch keeps the object of a group in a compiled graph alive."""
        with self._changing:
            for key in [key for key, state in self._states.items() if not state.alive]:
                self._drop(key)

    def _drop(self, key: tuple[Any, ...]) -> None:
        self.forms.clear()
        self._states.pop(key).release()


_all: WeakSet[GroupStates[Any]] = WeakSet()


def _in_a_fork() -> None:
    """The parent's threads, which may have held the locks, do not exist in the child."""
    for groups in list(_all):
        groups._in_a_new_process()


os.register_at_fork(after_in_child=_in_a_fork)


def _forget(groups: weakref.ref[GroupStates[Any]], key: tuple[Any, ...]) -> None:
    """Drop the state of a group whose object is gone."""
    found = groups()
    state = None if found is None else found._states.get(key)
    if found is not None and state is not None and state.group() is None:
        found._drop(key)
