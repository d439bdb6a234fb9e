"""AITER's communicators: one for each process group, made by all its ranks when first needed.

Nothing here is done while a CUDA graph is being captured, and every step is one that all ranks of the group take
together: the same calls in the same order give them the same sizes and the same outcomes (`fusion_core.agree`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_aiter import creation
from fusion_aiter.held import Held, Ready
from fusion_aiter.kernels import Kernel
from fusion_aiter.self_check import self_check
from fusion_aiter.stages import MOST, MOST_SHARED, stage_at
from fusion_core import Device, Reason, Status
from fusion_core.agree.agreement import NoAgreement
from fusion_core.run_time import fell_back
from fusion_core.workspaces import per_group
from fusion_core.workspaces.per_group import Groups, resolve, synchronize

LEAST = 1 << 20
"""Bytes of input that the smallest communicator takes."""

_UNCHECKED = object()


class Communicators:
    """All communicators of this process."""

    def __init__(self) -> None:
        self.groups: Groups[Held] = Groups(_entry, "aiter", one_at_a_time=True)  # as AITER counts what it makes

    def ready(self, kernel: Kernel, x: Tensor, group: str, max_tokens: int | None, one_stage: bool) -> Ready | None:
        """The communicator for one call; None where all ranks run it unfused.

        Args:
            kernel: What will be called.
            x: ``[tokens, n]``, contiguous, not empty.
            group: The process group's name.
            max_tokens: Rows above which to run unfused; None for no such bound.
            one_stage: Whether the user asked for kernels of one stage.
        """
        form = (kernel, group, x.dtype, x.shape, max_tokens, one_stage)
        found: Ready | None = self.groups.forms.get(form)
        if found is None or resolve(group) is not found.held.group():
            found = self._decide(kernel, x, group, max_tokens, one_stage)
            if found is None:
                return None
            self.groups.remember(form, found)
        found.held.enter()
        return found

    def _decide(self, kernel: Kernel, x: Tensor, group: str, max_tokens: int | None, one_stage: bool) -> Ready | None:
        held = self.groups.get((group,), x.device)
        tokens, hidden = x.shape
        if max_tokens is not None and tokens > max_tokens:
            return None
        stage = stage_at(kernel, tokens, hidden, x.dtype.itemsize, held.world_size, held.arch, one_stage=one_stage)
        if stage is None:
            return None
        strategy = _strategy(kernel, one_stage)
        if held.failure is not None and x.nbytes > held.max_size:
            fell_back(strategy, group, held.failure)  # for this strategy too: another's call may have met it first
            return None
        # above that size AITER runs other kernels, which are checked by themselves
        check = (kernel.name, x.dtype, stage, x.nbytes > MOST_SHARED)
        verdict = held.checked.get(check, _UNCHECKED)
        if isinstance(verdict, Reason):
            fell_back(strategy, group, verdict)
            return None
        lacking = x.nbytes > held.max_size or verdict is _UNCHECKED
        if lacking and not self._prepare(held, kernel, x, max_tokens, check, strategy):
            return None
        if not held.communicator.should_custom_ar(x):
            reason = Reason(
                "size",
                f"AITER does not take {x.nbytes} bytes",
                "its window of sizes to hold them",
                hint="see AITER_CUSTOM_AR_MAX_SIZE and AITER_CUSTOM_AR_MIN_SIZE",
            )
            fell_back(strategy, group, reason)
            return None
        return Ready(held, stage)

    def status(self) -> Iterator[Status]:
        """One line for each communicator of this process."""
        for held in self.groups:
            failed = [str(reason) for reason in held.checked.values() if reason is not None]
            state = str(held.failure) if held.failure is not None else "; ".join(failed) or "in use"
            yield Status(f"communicator of group {held.name}, {held.world_size} ranks", held.memory, state)

    def _prepare(
        self, held: Held, kernel: Kernel, x: Tensor, max_tokens: int | None, check: tuple[Any, ...], strategy: str
    ) -> bool:
        """Make the communicator, or a larger one, and run the self-check; whether the call can then be fused."""
        if per_group.capturing():
            reason = Reason(
                "capture",
                f"the first call of {kernel.name} on {tuple(x.shape)} came while a CUDA graph was captured",
                "one call outside of capture first",
                hint="run the model once before capturing it",
            )
            fell_back(strategy, held.name, reason)
            return False
        return self.groups.prepare(held, lambda: self._prepare_now(held, kernel, x, max_tokens, check, strategy))

    def _prepare_now(
        self, held: Held, kernel: Kernel, x: Tensor, max_tokens: int | None, check: tuple[Any, ...], strategy: str
    ) -> bool:
        if held.device.type == "cuda":
            torch.cuda.set_device(held.device)
        hidden = x.shape[1]
        row = hidden * x.dtype.itemsize
        # of the self-check: no more than the smallest communicator takes
        rows = MOST_SHARED // row + 1 if check[3] else min(2 * held.world_size + 1, LEAST // row)
        if x.nbytes > held.max_size:
            wanted = MOST
            if max_tokens is not None:
                wanted = max(LEAST, max(max_tokens, rows) * row)
                wanted = min(MOST, 1 << (wanted - 1).bit_length())
            held.failure = self._make(held, f"{kernel.name} of {tuple(x.shape)}", max(wanted, x.nbytes))
            if held.failure is not None:
                fell_back(strategy, held.name, held.failure)
                return False
        if check not in held.checked:
            vote = self.groups.agreement(held, f"the self-check of {kernel.name}", creation.STEP)
            problem = self_check(kernel, held, (rows, hidden), x.dtype, one_stage=check[2])
            reason = vote.outcome(problem)
            held.checked[check] = reason
            if reason is not None:
                fell_back(strategy, held.name, reason)
            synchronize(held.device)  # the check used the communicator on another stream than the call will
        return held.checked[check] is None

    def _make(self, held: Held, call: str, max_size: int) -> Reason | None:
        """A communicator of this size in place of the one held; why not, the same reason on all ranks."""
        facts, problem = creation.facts(held.device, max_size)
        facts["call"] = call
        first = self.groups.agreement(held, "what a communicator needs", creation.ARRIVAL)
        try:
            ranks = first.gather(facts)
            problem = problem or creation.disagreement(ranks) or creation.unreachable(held.device, ranks)
        except NoAgreement as error:
            problem, ranks = error.reason, []
        if reason := self.groups.agreement(held, "whether to make a communicator", creation.STEP).outcome(problem):
            return reason
        made, group = None, held.group()
        try:
            assert group is not None
            made = creation.create(group, held.device, max_size, ranks)
            synchronize(held.device)
        except Exception as error:  # noqa: BLE001  # whatever it is: the other ranks must hear of it
            problem = Reason("communicator", f"making a communicator raised {type(error).__name__}: {error}")
        reason = self.groups.agreement(held, "whether the communicator came up", creation.BUILT).outcome(problem)
        if reason is not None:
            if made is not None:
                creation.free(made)
            return reason
        assert made is not None
        # every rank has come past its last use of the old one: they have just voted
        self.groups.forms.clear()
        held.replace(made, max_size)
        return None


def _strategy(kernel: Kernel, one_stage: bool) -> str:
    return f"aiter.{kernel.name}{'_one_stage' if one_stage else ''}"


def _entry(key: tuple[Any, ...], group: weakref.ref[dist.ProcessGroup], world_size: int, device: torch.device) -> Held:
    return Held(key, group, world_size, device, Device.of(device).arch)


COMMUNICATORS = Communicators()
"""What this process has of AITER's."""
