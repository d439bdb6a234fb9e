"""What a backend keeps for a process group: made by all its ranks when first needed, given back with the group.

For operators whose kernels need memory that all ranks of a group share. Such memory is made outside of any capture and
away from the caller's memory pool, is used by one stream at a time, and has to go when its group goes.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core.agree.agreement import Agreement

T = TypeVar("T")

resolve: Callable[[Any], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and bool(torch._C._cuda_isCurrentStreamCapturing())


def synchronize(device: torch.device) -> None:
    """Wait for all that the device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host() -> str:
    """The running kernel of this host: containers of one host share it, whatever they are called."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        import socket

        return socket.gethostname()


def outside(work: Callable[[], T], lock: AbstractContextManager[Any] | None = None) -> T:
    """Run on a thread of our own, where the caller's memory pool, stream and autograd modes do not reach.

    Inductor warms a graph up with its memory in the graph's pool; what outlives the graph must not lie there.

    A caller that is interrupted leaves the work running. Who comes again waits for it at the lock, and finds it done.

    Args:
        work: What to do.
        lock: Held meanwhile, by that thread and not by the caller; None for one that such works of this process share.
    """
    if getattr(_inside, "yes", False):
        return work()
    future: Future[T] = Future()

    def run() -> None:
        _inside.yes = True
        try:
            with _one_at_a_time if lock is None else lock:
                found = work()
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            future.set_exception(error)
        else:
            future.set_result(found)

    # no pool: its threads are gone in a fork, which would wait for them, and at the end of the process Python would
    # wait for them with no way for them to hear of it
    threading.Thread(target=run, name="fusion_core").start()
    return future.result()


_inside = threading.local()
_one_at_a_time = threading.Lock()


@dataclass(eq=False)
class PerGroup:
    """What one process group has of a backend's; a base class.

    Attributes:
        key: What it is found by; the group's name comes first.
        group: The process group.
        world_size: Its number of ranks.
        device: The device of this rank.
        captured: Whether a CUDA graph may hold what is kept here.
        zeros: Of each dtype, for kernels whose residual is not optional.
    """

    key: tuple[Any, ...]
    group: weakref.ref[dist.ProcessGroup]
    world_size: int
    device: torch.device
    captured: bool = field(default=False, kw_only=True)
    zeros: dict[torch.dtype, Tensor] = field(default_factory=dict, kw_only=True)
    _stream: torch.cuda.Stream | None = field(default=None, init=False)
    _stream_id: int = field(default=-1, init=False)

    @property
    def name(self) -> str:
        """The group's name."""
        return str(self.key[0])

    @property
    def alive(self) -> bool:
        """Whether the group of this name is still the one that this was made for."""
        try:
            return resolve(self.key[0]) is self.group()
        except (RuntimeError, LookupError):
            return False

    def enter(self) -> None:
        """Before each use: wait for another stream's, and note whether a CUDA graph keeps this one.

        CUDA graphs that are replayed on two streams at once are the caller's to order.
        """
        if self.device.type == "cuda":
            stream_id = torch._C._cuda_getCurrentRawStream(self.device.index)
            if stream_id != self._stream_id and not capturing():
                current = torch.cuda.current_stream(self.device)
                if self._stream is not None:
                    current.wait_stream(self._stream)
                self._stream, self._stream_id = current, stream_id
        if not self.captured and capturing():
            self.captured = True

    def zeros_like(self, like: Tensor, room: int) -> tuple[Tensor, bool]:
        """Zeros of a tensor's shape and dtype, read only, out of one buffer.

        Args:
            like: The tensor.
            room: Elements of the buffer, where there is none that is large enough.

        Returns:
            The zeros, and whether they last: those that a CUDA graph makes for itself, where no call came before it,
            do not.
        """
        found = self.zeros.get(like.dtype)
        if found is None or found.numel() < like.numel():
            if capturing():
                return torch.zeros_like(like), False
            found = outside(lambda: _zeros(room, like.dtype, self.device))
            self.zeros[like.dtype] = found
        return found[: like.numel()].view(like.shape), True

    def release(self) -> None:
        """Give back what is kept here."""
        raise NotImplementedError


def _zeros(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that every stream may read at once."""
    found = torch.zeros(elements, dtype=dtype, device=device)
    synchronize(device)
    return found


P = TypeVar("P", bound=PerGroup)


MOST_FORMS = 4096
"""Forms of calls that are remembered; a server with run-time token counts meets many."""


class Groups(Generic[P]):
    """All that a backend keeps in this process, by key.

    Attributes:
        lock: Held while an entry is made or changed.
        forms: For the backend: what was decided of calls of one form; forgotten when an entry goes.

    Args:
        make: From (key, the group, its number of ranks, the device) to an entry that holds nothing yet.
        backend: The backend's name, for what its ranks agree on.
        one_at_a_time: Whether groups are prepared one after another: for a library that counts what it makes by process
            and not by group. Threads that use several groups for the first time in another order on each rank wait for
            each other's time limit then.
    """

    def __init__(
        self,
        make: Callable[[Any, weakref.ref[dist.ProcessGroup], int, torch.device], P],
        backend: str,
        *,
        one_at_a_time: bool = False,
    ) -> None:
        self.forms: dict[Any, Any] = {}
        self._make = make
        self._backend = backend
        self._held: dict[tuple[Any, ...], P] = {}
        self._numbers: WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = WeakKeyDictionary()
        self._one_at_a_time = one_at_a_time
        self._in_a_new_process()
        _all.add(self)

    def _in_a_new_process(self) -> None:
        self.lock = threading.RLock()
        self._lock = threading.Lock()
        self._preparing: dict[str, threading.Lock] = {}

    def __iter__(self) -> Iterator[P]:
        """The entries of groups that live."""
        self._sweep()
        return iter(list(self._held.values()))

    def get(self, key: tuple[Any, ...], device: torch.device) -> P:
        """The entry of a key, a new one where there is none or its group is gone."""
        held = self._held.get(key)
        return held if held is not None and held.alive else self._open(key, device)

    def _open(self, key: tuple[Any, ...], device: torch.device) -> P:
        self._sweep()
        with self.lock:
            group = resolve(key[0])
            held = self._make(key, weakref.ref(group), group.size(), device)
            self._held[key] = held
            weakref.finalize(group, _forget, weakref.ref(self), key).atexit = False
            return held

    def remember(self, form: Any, decided: Any) -> None:
        """Put a form into `forms`."""
        if len(self.forms) >= MOST_FORMS:
            self.forms.clear()
        self.forms[form] = decided

    def prepare(self, held: P, work: Callable[[], T]) -> T:
        """Run what all ranks of a group do together, see `outside`; nothing else of this group meanwhile."""
        with self._lock:
            lock = self._preparing.setdefault("" if self._one_at_a_time else held.name, threading.Lock())
        return outside(work, lock)

    def agreement(self, held: P, subject: str, timeout: float) -> Agreement:
        """A fresh agreement between the ranks of a group; numbered, since a subject may come again.

        Args:
            held: An entry of the group.
            subject: What is agreed on, as a phrase.
            timeout: Seconds that a step waits for the other ranks.
        """
        group = held.group()
        assert group is not None
        with self._lock:
            # by subject: what one rank alone needs shifts nothing else
            number = self._numbers.setdefault(group, Counter())[subject]
            self._numbers[group][subject] += 1
        return Agreement(group, f"{subject} ({self._backend}, step {number})", timeout)

    def release(self, group: str | None = None) -> None:
        """Give back what one group has, or all groups; CUDA graphs that hold it must be gone."""
        with self.lock:
            for key in [key for key in self._held if group in (None, key[0])]:
                self._drop(key)

    def _sweep(self) -> None:
        """Give back what groups that were destroyed left: torch keeps the group of a compiled graph as an object."""
        with self.lock:
            for key in [key for key, held in self._held.items() if not held.alive]:
                self._drop(key)

    def _drop(self, key: tuple[Any, ...]) -> None:
        self.forms.clear()
        self._held.pop(key).release()


_all: WeakSet[Groups[Any]] = WeakSet()


def _in_a_fork() -> None:
    """Threads of the parent, which may have held locks, are not here."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()
    _inside.yes = False
    for groups in list(_all):
        groups._in_a_new_process()


os.register_at_fork(after_in_child=_in_a_fork)


def _forget(groups: weakref.ref[Groups[Any]], key: tuple[Any, ...]) -> None:
    """The group is gone: so is the use of what it had."""
    found = groups()
    held = None if found is None else found._held.get(key)
    if found is not None and held is not None and held.group() is None:
        found._drop(key)
