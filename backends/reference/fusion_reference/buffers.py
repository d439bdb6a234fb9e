"""Buffers in symmetric memory: one for each process group, made by all its ranks when first needed.

Nothing here is done while a CUDA graph is being captured, and every step is one that all ranks of the group take
together: the same calls in the same order give them the same sizes and the same outcomes (`fusion_core.agree`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_core import Reason, Status
from fusion_core.agree.agreement import NoAgreement
from fusion_core.patterns.plain import all_reduce
from fusion_core.run_time import fell_back
from fusion_core.workspaces import per_group
from fusion_core.workspaces.per_group import Groups, PerGroup, resolve, synchronize
from fusion_core.workspaces.self_check import farthest_off
from fusion_reference import symm_mem

ARRIVAL = 900.0
"""Seconds for all ranks to come to their first call: one may still compile its model."""

STEP = 60.0
"""Seconds for each later step, in which no rank does more than CUDA calls."""

LEAST, MOST = 16 << 20, 512 << 20
"""Bytes of the smallest buffer and of the largest; more than the largest goes through torch's all_reduce."""

CHECKED = (33, 1024)
"""Shape of the self-check: as many blocks of threads as the kernels ever launch, or nearly, and an odd share a rank."""

_UNCHECKED = object()


@dataclass(eq=False)
class Held(PerGroup):
    """What one process group has.

    Attributes:
        buffer: Bytes; None before they are allocated.
        failure: Why there are none, or no more, and will be none.
        checked: (kernel, dtype) → None where the self-check passed, else why not.
        retired: Smaller buffers that CUDA graphs may hold.
    """

    buffer: Tensor | None = None
    failure: Reason | None = None
    checked: dict[tuple[str, torch.dtype], Reason | None] = field(default_factory=dict)
    retired: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes that a call may have."""
        return 0 if self.buffer is None else self.buffer.numel()

    def replace(self, buffer: Tensor) -> None:
        """Take a new buffer; the old one is kept where a graph may hold it."""
        if self.buffer is not None and self.captured:
            self.retired.append(self.buffer)
        self.buffer, self.captured = buffer, False

    def release(self) -> None:
        """Let go of the memory. The driver keeps it until the last rank has."""
        self.buffer = None
        self.retired.clear()


class Ready(NamedTuple):
    """The part of a buffer that takes one form of call."""

    held: Held
    piece: Tensor

    def run(self, kernel: str, x: Tensor) -> Tensor:
        """The sum, in memory of its own: the buffer is the next call's.

        The copy is a kernel of its own. ``one_shot_all_reduce_copy`` would do it, but its blocks signal that their part
        is there before all of their threads have written it: there is no ``__syncthreads`` between the two. Not by
        ``copy_`` either, which is the driver's and in a CUDA graph takes some microseconds longer than a kernel.
        """
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(x, 1.0, out=self.piece)
        symm_mem.KERNELS[kernel](self.piece, out, self.held.name)
        return out


class Buffers:
    """All buffers of this process.

    Attributes:
        exchanges: How often handles were exchanged, see `symm_mem.facts`.
        spoilt: Why no exchange can be tried again: after one that failed, torch's count is no longer the same on all
            ranks.
    """

    def __init__(self) -> None:
        self.groups: Groups[Held] = Groups(Held, "reference", one_at_a_time=True)  # as torch counts exchanges
        self.exchanges = 0
        self.spoilt: Reason | None = None

    def ready(self, kernel: str, x: Tensor, group: str, max_tokens: int | None) -> Ready | None:
        """Where one call goes; None where all ranks run it through torch's all_reduce.

        Args:
            kernel: One of `symm_mem.KERNELS`.
            x: ``[..., n]``, not empty.
            group: The process group's name.
            max_tokens: The capacity in rows; None for any.
        """
        form = (kernel, group, x.dtype, x.shape, max_tokens)
        found: Ready | None = self.groups.forms.get(form)
        if found is None or resolve(group) is not found.held.group():
            found = self._decide(kernel, x, group, max_tokens)
            if found is None:
                return None
            self.groups.remember(form, found)
        found.held.enter()
        return found

    def _decide(self, kernel: str, x: Tensor, group: str, max_tokens: int | None) -> Ready | None:
        if x.nbytes > MOST or (max_tokens is not None and x.numel() > max_tokens * x.shape[-1]):
            return None
        held = self.groups.get((group,), x.device)
        verdict: Any = held.checked.get((kernel, x.dtype), _UNCHECKED)
        if held.failure is not None and x.nbytes > held.size:  # what there is goes on
            verdict = held.failure
        if isinstance(verdict, Reason):  # for this strategy too: another's call may have met it first
            fell_back(strategy(kernel), group, verdict)
            return None
        if (x.nbytes > held.size or verdict is _UNCHECKED) and not self._prepare(held, kernel, x, max_tokens):
            return None
        return _piece(held, x.shape, x.dtype)

    def status(self) -> Iterator[Status]:
        """One line for each buffer of this process."""
        for held in self.groups:
            buffers = [*held.retired, *([] if held.buffer is None else [held.buffer])]
            memory = sum(symm_mem.memory(each.numel()) for each in buffers)
            failed = [str(reason) for reason in held.checked.values() if reason is not None]
            state = str(held.failure) if held.failure is not None else "; ".join(failed) or "in use"
            yield Status(f"symmetric memory of group {held.name}, {held.world_size} ranks", memory, state)

    def _prepare(self, held: Held, kernel: str, x: Tensor, max_tokens: int | None) -> bool:
        """Make the buffer, or a larger one, and check the kernel; whether the call can then use it."""
        if per_group.capturing():
            reason = Reason(
                "capture",
                f"the first call on {tuple(x.shape)} came while a CUDA graph was captured",
                "one call outside of capture first",
                hint="run the model once before capturing it",
            )
            fell_back(strategy(kernel), held.name, reason)
            return False
        return self.groups.prepare(held, lambda: self._prepare_now(held, kernel, x, max_tokens))

    def _prepare_now(self, held: Held, kernel: str, x: Tensor, max_tokens: int | None) -> bool:
        if held.device.type == "cuda":
            torch.cuda.set_device(held.device)
        if x.nbytes > held.size:
            wanted = max(LEAST, 1 << (x.nbytes - 1).bit_length())
            if max_tokens is not None:  # no more than is ever used
                room = max_tokens * x.shape[-1] * x.dtype.itemsize
                wanted = max(min(wanted, room), x.nbytes, CHECKED[0] * CHECKED[1] * 4)
            held.failure = self._make(held, f"{kernel} of {tuple(x.shape)}", -(-wanted // 16) * 16)
            if held.failure is not None:
                fell_back(strategy(kernel), held.name, held.failure)
                return False
        check = kernel, x.dtype
        if check not in held.checked:
            vote = self.groups.agreement(held, f"the self-check of {kernel} in {x.dtype}", STEP)
            held.checked[check] = vote.outcome(_self_check(held, kernel, x.dtype))
            synchronize(held.device)  # the check used the buffer on another stream than the call will
        reason = held.checked[check]
        if reason is not None:
            fell_back(strategy(kernel), held.name, reason)
        return reason is None

    def _make(self, held: Held, call: str, size: int) -> Reason | None:
        """A buffer of ``size`` bytes in place of the one held; why not, the same reason on all ranks."""
        facts, problem = symm_mem.facts(call, size, held.device, self.exchanges)
        try:
            ranks = self.groups.agreement(held, "what a buffer needs", ARRIVAL).gather(facts)
            problem = symm_mem.disagreement(ranks, held.device) or problem or self.spoilt
        except NoAgreement as error:
            problem = error.reason
        if reason := self.groups.agreement(held, "whether to make a buffer", STEP).outcome(problem):
            return reason
        buffer: Tensor | None = None
        try:
            buffer = symm_mem.allocate(size, held.device)
        except Exception as error:  # noqa: BLE001  # whatever it is: the other ranks must hear of it
            problem = Reason("memory", f"allocating {size >> 20} MiB raised {type(error).__name__}: {error}")
        # before the exchange: a rank that stayed away would leave the others waiting in it
        if reason := self.groups.agreement(held, "whether there is memory", STEP).outcome(problem):
            return reason
        group = held.group()
        assert buffer is not None
        assert group is not None
        self.exchanges += 1
        try:
            symm_mem.exchange(buffer, group, STEP / 2)
            synchronize(held.device)
        except Exception as error:  # noqa: BLE001  # as above
            problem = Reason("exchange", f"the exchange of handles raised {type(error).__name__}: {error}")
        if reason := self.groups.agreement(held, "whether the buffer came up", STEP).outcome(problem):
            self.spoilt = reason
            return reason
        # every rank has come past its last use of the old one: they have just voted
        self.groups.forms.clear()
        held.replace(buffer)
        return None


def _piece(held: Held, shape: torch.Size, dtype: torch.dtype) -> Ready:
    """The front of the buffer as a tensor; a normal one where the caller infers, since later callers may not."""
    assert held.buffer is not None
    with torch.inference_mode(False):
        return Ready(held, held.buffer.view(dtype)[: shape.numel()].view(shape))


def _self_check(held: Held, kernel: str, dtype: torch.dtype) -> Reason | None:
    """Why a kernel is not used here, or None. Every rank of the group calls it."""
    ready = _piece(held, torch.Size(CHECKED), dtype)
    rank = resolve(held.name).rank()
    try:
        worst = farthest_off(
            all_reduce, lambda given: {"reduced": ready.run(kernel, given["x"])}, CHECKED, dtype, held.device,
            held.name, rank,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001  # a kernel fails in any way; the model must go on without it
        return Reason("self_check", f"the self-check of {kernel} raised {type(error).__name__}: {error}")
    if worst <= 1:
        return None
    return Reason(
        "self_check",
        f"torch's {kernel} kernel is {worst:.3g} times as far from float64 as its dtype allows on this machine",
        "a kernel that is right",
        hint="report it to pytorch/pytorch with `fusion-core verify reference --json`",
    )


def strategy(kernel: str) -> str:
    """The name of the strategy that runs a kernel."""
    return f"reference.symm_mem_{kernel}"


BUFFERS = Buffers()
