"""FlashInfer's workspaces: one for each process group and dtype class, made by all its ranks when first needed.

Nothing here is done while a CUDA graph is being captured, and every step is one that all ranks of the group take
together: the same calls in the same order give them the same sizes, and `fusion_core.agreement` the same outcomes.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core import Device, Reason, Status
from fusion_core.agreement import Agreement, NoAgreement
from fusion_core.run_time import fell_back
from fusion_flashinfer import creation
from fusion_flashinfer.kernels import Kernel
from fusion_flashinfer.limits import Limit, limit
from fusion_flashinfer.self_check import self_check

LEAST_ELEMENTS = 1 << 20
"""A workspace's smallest capacity: 16 MiB a rank at 2 ranks and 16 bits."""

Key = tuple[str, bool, bool]
T = TypeVar("T")

_UNCHECKED = object()

resolve: Callable[[Any], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]


class Ready:
    """A workspace that can take a call.

    Attributes:
        handle: FlashInfer's workspace.
        one_shot: Which of the two kernels to run; None to leave it to FlashInfer (mnnvl).
        call: ``flashinfer.comm.allreduce_fusion``.
    """

    __slots__ = ("_held", "call", "handle", "one_shot")

    def __init__(self, held: Held, one_shot: bool | None) -> None:
        self._held = held
        self.handle = held.handle
        self.call = held.call
        self.one_shot = one_shot

    def zeros(self, like: Tensor) -> Tensor:
        """Zeros of a tensor's shape and dtype, for kernels whose residual is not optional; read only."""
        return self._held.zeros_like(like)


@dataclass(eq=False)
class Held:
    """What one process group has, for one dtype class.

    Attributes:
        key: The group's name, whether the dtype is float32, whether the kernels are mnnvl's.
        group: The process group.
        bound: Sizes at which kernels are used.
        handle: FlashInfer's workspace; None before it is made.
        elements: Its capacity.
        failure: Why there is none and will be none.
        checked: (code, dtype, one-shot, PDL) → None where the self-check passed, else why not.
        captured: Whether a CUDA graph may hold the handle.
        retired: Smaller workspaces that CUDA graphs may hold.
    """

    key: Key
    group: weakref.ref[dist.ProcessGroup]
    rank: int
    world_size: int
    device: torch.device
    bound: Limit
    handle: Any = None
    call: Callable[..., Any] = field(default=lambda **_: None)
    elements: int = 0
    failure: Reason | None = None
    checked: dict[tuple[Any, ...], Reason | None] = field(default_factory=dict)
    captured: bool = False
    retired: list[Any] = field(default_factory=list)
    zeros: dict[torch.dtype, Tensor] = field(default_factory=dict)
    ready: dict[bool | None, Ready] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None
    stream_id: int = -1

    @property
    def alive(self) -> bool:
        """Whether the group of this name is still the one that this was made for."""
        try:
            return resolve(self.key[0]) is self.group()
        except (RuntimeError, LookupError):
            return False

    def zeros_like(self, like: Tensor) -> Tensor:
        """Zeros of a tensor's shape and dtype out of one buffer that is as large as the workspace takes."""
        found = self.zeros.get(like.dtype)
        if found is None or found.numel() < like.numel():
            if creation.capturing():
                return torch.zeros_like(like)
            found = outside(lambda: creation.zeros(self.elements, like.dtype, self.device))
            self.zeros[like.dtype] = found
        return found[: like.numel()].view(like.shape)

    def follow(self, stream_id: int) -> None:
        """Have the current stream wait for the one that used the workspace before: its flags allow one call at a time.

        CUDA graphs that are replayed on two streams at once are the caller's to order.
        """
        if creation.capturing():
            return
        current = torch.cuda.current_stream(self.device)
        if self.stream is not None:
            current.wait_stream(self.stream)
        self.stream, self.stream_id = current, stream_id

    def release(self) -> None:
        """Give the memory back."""
        handles = [*self.retired, *([] if self.handle is None else [self.handle])]
        self.handle, self.elements = None, 0
        self.retired.clear()
        self.zeros.clear()
        self.ready.clear()
        for handle in handles:
            creation.free(handle)


class Workspaces:
    """All workspaces of this process."""

    def __init__(self) -> None:
        self._held: dict[Key, Held] = {}
        self._lock = threading.RLock()
        self._number: dict[str, itertools.count[int]] = {}

    def ready(
        self, kernel: Kernel, x: Tensor, group: str, max_tokens: int | None, pdl: bool, mnnvl: bool
    ) -> Ready | None:
        """The workspace for one call; None where all ranks run it unfused.

        Args:
            kernel: What will be called.
            x: ``[tokens, n]``, not empty.
            group: The process group's name.
            max_tokens: The capacity in rows; None for as much as pays.
            pdl: Whether with programmatic dependent launch.
            mnnvl: Whether with multicast kernels.
        """
        key = (group, x.dtype is torch.float32, mnnvl)
        held = self._held.get(key)
        if held is None or not held.alive:
            held = self._open(key, x.device)
        if held.failure is not None:
            return None
        tokens = x.shape[0]
        size = x.numel()
        one_shot = held.bound.one_shot_at(size * x.dtype.itemsize, tokens, held.world_size)
        if one_shot is None or (max_tokens is not None and tokens > max_tokens):
            return None
        if mnnvl:
            one_shot = None  # it has kernels of its own, and its own rule
        check = (kernel.code, x.dtype, one_shot, pdl)
        verdict = held.checked.get(check, _UNCHECKED)
        if isinstance(verdict, Reason):
            return None
        if (size > held.elements or verdict is _UNCHECKED) and not self._prepare(held, kernel, x, max_tokens, check):
            return None
        stream_id = creation.stream_id(held.device)
        if stream_id != held.stream_id:
            held.follow(stream_id)
        if not held.captured and creation.capturing():
            held.captured = True
        found = held.ready.get(one_shot)
        if found is None:
            found = held.ready[one_shot] = Ready(held, one_shot)
        return found

    def status(self) -> Iterator[Status]:
        """One line for each workspace of this process."""
        self._sweep()
        for held in list(self._held.values()):
            group, wide, mnnvl = held.key
            kind = "mnnvl" if mnnvl else "trtllm"
            subject = f"{kind} workspace of group {group}, {held.world_size} ranks, {32 if wide else 16} bits"
            handles = [*held.retired, held.handle]
            memory = sum(creation.memory(handle) for handle in handles if handle is not None)
            memory += sum(zeros.nbytes for zeros in held.zeros.values())
            failed = [str(reason) for reason in held.checked.values() if reason is not None]
            state = str(held.failure) if held.failure is not None else "; ".join(failed) or "in use"
            yield Status(subject, memory, state)

    def release(self, group: str | None = None) -> None:
        """Give back the memory of one group's workspaces, or of all; CUDA graphs that hold them must be gone."""
        with self._lock:
            for key in [key for key in self._held if group in (None, key[0])]:
                self._held.pop(key).release()

    def _sweep(self) -> None:
        """Give back what groups that were destroyed left: torch keeps the group of a compiled graph as an object."""
        with self._lock:
            for key in [key for key, held in self._held.items() if not held.alive]:
                self._held.pop(key).release()

    def _open(self, key: Key, device: torch.device) -> Held:
        """The entry of a group."""
        self._sweep()
        with self._lock:
            group = resolve(key[0])
            arch = Device.of(device).arch
            held = Held(key, weakref.ref(group), group.rank(), group.size(), device, limit(arch, group.size()))
            self._held[key] = held
            weakref.finalize(group, _forget, weakref.ref(self), key).atexit = False
            return held

    def _prepare(self, held: Held, kernel: Kernel, x: Tensor, max_tokens: int | None, check: tuple[Any, ...]) -> bool:
        """Make the workspace, or a larger one, and run the self-check; whether the call can then be fused."""
        if creation.capturing():
            reason = Reason(
                "capture",
                f"the first call of {kernel.name} on {tuple(x.shape)} came while a CUDA graph was captured",
                "one call outside of capture first",
                hint="run the model once before capturing it",
            )
            fell_back(_strategy(kernel, check, held.key), held.key[0], reason)
            return False
        with self._lock:
            return outside(lambda: self._prepare_now(held, kernel, x, max_tokens, check))

    def _prepare_now(
        self, held: Held, kernel: Kernel, x: Tensor, max_tokens: int | None, check: tuple[Any, ...]
    ) -> bool:
        if held.device.type == "cuda":
            torch.cuda.set_device(held.device)
        hidden = x.shape[1]
        rows = max(2 * held.world_size + 1, 5)  # of the self-check
        if x.numel() > held.elements:
            wanted = max(LEAST_ELEMENTS, rows * hidden, 1 << (x.numel() - 1).bit_length())
            if max_tokens is not None:
                wanted = max(max_tokens, rows) * hidden
            held.failure = self._make(held, f"{kernel.name} of {tuple(x.shape)}", -(-wanted // hidden), hidden, x.dtype)
            if held.failure is not None:
                fell_back(_strategy(kernel, check, held.key), held.key[0], held.failure)
                return False
        if check not in held.checked:
            vote = self._agreement(held, f"the self-check of {kernel.name}", creation.STEP)
            problem = self_check(
                kernel, Ready(held, check[2]), rows, hidden, x.dtype, held.device, held.key[0], pdl=check[3]
            )
            reason = vote.outcome(problem)
            held.checked[check] = reason
            if reason is not None:
                fell_back(_strategy(kernel, check, held.key), held.key[0], reason)
            creation.synchronize(held.device)  # the check used the workspace on another stream than the call will
        return held.checked[check] is None

    def _make(self, held: Held, call: str, tokens: int, hidden: int, dtype: torch.dtype) -> Reason | None:
        """A workspace of this capacity in place of the one held; why not, the same reason on all ranks."""
        mnnvl = held.key[2]
        facts, problem = creation.facts(tokens, hidden, dtype, held.device, held.world_size, mnnvl=mnnvl)
        facts["call"] = call
        first = self._agreement(held, "what a workspace needs", creation.ARRIVAL)
        try:
            problem = creation.disagreement(first.gather(facts)) or problem
        except NoAgreement as error:
            problem = error.reason
        if reason := self._agreement(held, "whether to make a workspace", creation.STEP).outcome(problem):
            return reason
        made, group = None, held.group()
        exchange = self._agreement(held, "the exchange of a workspace's handles", creation.STEP)
        try:
            assert group is not None
            made = creation.create(exchange, group, tokens, hidden, dtype, mnnvl=mnnvl)
            creation.synchronize(held.device)
        except Exception as error:  # noqa: BLE001  # whatever it is: the other ranks must hear of it
            problem = Reason("workspace", f"making a workspace raised {type(error).__name__}: {error}")
            exchange.abandon(problem)
        reason = self._agreement(held, "whether the workspace came up", creation.STEP).outcome(problem)
        if reason is not None:
            if made is not None:
                creation.free(made)
            return reason
        old, held.handle, held.elements = held.handle, made, tokens * hidden
        held.call = creation.call()
        held.zeros.clear()
        held.ready.clear()
        if old is not None and held.captured:
            held.retired.append(old)
        elif old is not None:
            creation.free(old)  # every rank has come past its last use: they have just voted
        held.captured = False
        return None

    def _agreement(self, held: Held, subject: str, timeout: float) -> Agreement:
        """A fresh agreement; numbered, since a subject comes again when a workspace grows."""
        group = held.group()
        assert group is not None
        # never from the start again in this process: a later group of this name may meet in the same store
        number = next(self._number.setdefault(held.key[0], itertools.count()))
        return Agreement(group, f"{subject} (flashinfer, step {number})", timeout)


def _strategy(kernel: Kernel, check: tuple[Any, ...], key: Key) -> str:
    return f"flashinfer.{kernel.name}{'_pdl' if check[3] else ''}{'_mnnvl' if key[2] else ''}"


def _forget(workspaces: weakref.ref[Workspaces], key: Key) -> None:
    """The group is gone: so is the use of its workspace."""
    found = workspaces()
    held = None if found is None else found._held.get(key)
    if found is not None and held is not None and held.group() is None:
        found._held.pop(key).release()


def outside(work: Callable[[], T]) -> T:
    """Run on a thread of our own, where the caller's memory pool, stream and autograd modes do not reach.

    Inductor warms a graph up with its memory in the graph's pool; what outlives the graph must not lie there.
    """
    if getattr(_inside, "yes", False):
        return work()
    return _thread().submit(work).result()


_inside = threading.local()


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fusion_flashinfer", initializer=lambda: setattr(_inside, "yes", True))


WORKSPACES = Workspaces()
