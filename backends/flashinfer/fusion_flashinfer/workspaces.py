"""FlashInfer's workspaces: one for each process group and dtype class, made by all its ranks when first needed.

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

from fusion_core import Reason, Status
from fusion_core.agree.agreement import NoAgreement
from fusion_core.run_time import fell_back
from fusion_core.workspaces import per_group
from fusion_core.workspaces.per_group import Groups, resolve, synchronize
from fusion_flashinfer import creation
from fusion_flashinfer.held import Held, Ready
from fusion_flashinfer.kernels import Kernel
from fusion_flashinfer.limits import MOST
from fusion_flashinfer.self_check import self_check

LEAST_ELEMENTS = 1 << 20
"""A workspace's smallest capacity: 16 MiB a rank at 2 ranks and 16 bits."""

_UNCHECKED = object()


class Workspaces:
    """All workspaces of this process."""

    def __init__(self) -> None:
        self.groups: Groups[Held] = Groups(_entry, "flashinfer")

    def ready(
        self, kernel: Kernel, x: Tensor, group: str, max_tokens: int | None, pdl: bool, mnnvl: bool, two_shot: bool
    ) -> Ready | None:
        """The workspace for one call; None where all ranks run it unfused.

        Args:
            kernel: What will be called.
            x: ``[tokens, n]``, not empty.
            group: The process group's name.
            max_tokens: The capacity in rows; None for as much as pays.
            pdl: Whether with programmatic dependent launch.
            mnnvl: Whether with multicast kernels.
            two_shot: Whether in two steps.
        """
        form = (kernel.code, group, x.dtype, x.shape, max_tokens, pdl, mnnvl, two_shot)
        found: Ready | None = self.groups.forms.get(form)
        if found is None or resolve(group) is not found.held.group():
            found = self._decide(kernel, x, group, max_tokens, pdl, mnnvl, two_shot)
            if found is None:
                return None
            self.groups.remember(form, found)
        found.held.enter()
        return found

    def _decide(
        self, kernel: Kernel, x: Tensor, group: str, max_tokens: int | None, pdl: bool, mnnvl: bool, two_shot: bool
    ) -> Ready | None:
        held = self.groups.get((group, x.dtype is torch.float32, mnnvl), x.device)
        size = x.numel()
        one_shot: bool | None = not two_shot or x.shape[0] <= held.world_size
        if mnnvl:
            one_shot = None  # it has kernels of its own, and its own rule
        check = (kernel.code, x.dtype, one_shot, pdl)
        verdict = held.checked.get(check, _UNCHECKED)
        if held.failure is not None and size > held.elements:  # what there is goes on
            verdict = held.failure
        if isinstance(verdict, Reason):  # for this strategy too: another's call may have met it first
            fell_back(_strategy(kernel, check, held.key), group, verdict)
            return None
        if (size > held.elements or verdict is _UNCHECKED) and not self._prepare(held, kernel, x, max_tokens, check):
            return None
        return Ready(held, one_shot)

    def status(self) -> Iterator[Status]:
        """One line for each workspace of this process."""
        for held in self.groups:
            group, wide, mnnvl = held.key
            kind = "mnnvl" if mnnvl else "trtllm"
            subject = f"{kind} workspace of group {group}, {held.world_size} ranks, {32 if wide else 16} bits"
            failed = [str(reason) for reason in held.checked.values() if reason is not None]
            state = str(held.failure) if held.failure is not None else "; ".join(failed) or "in use"
            yield Status(subject, held.memory, state)

    def _prepare(self, held: Held, kernel: Kernel, x: Tensor, max_tokens: int | None, check: tuple[Any, ...]) -> bool:
        """Make the workspace, or a larger one, and run the self-check; whether the call can then be fused."""
        if per_group.capturing():
            reason = Reason(
                "capture",
                f"the first call of {kernel.name} on {tuple(x.shape)} came while a CUDA graph was captured",
                "one call outside of capture first",
                hint="run the model once before capturing it",
            )
            fell_back(_strategy(kernel, check, held.key), held.key[0], reason)
            return False
        return self.groups.prepare(held, lambda: self._prepare_now(held, kernel, x, max_tokens, check))

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
                # no more than is ever used: larger ones would also overflow an index of the kernels
                wanted = max(min(max_tokens * hidden, MOST // x.dtype.itemsize), x.numel(), rows * hidden)
            held.failure = self._make(held, f"{kernel.name} of {tuple(x.shape)}", -(-wanted // hidden), hidden, x.dtype)
            if held.failure is not None:
                fell_back(_strategy(kernel, check, held.key), held.key[0], held.failure)
                return False
        if check not in held.checked:
            vote = self.groups.agreement(held, f"the self-check of {kernel.name}", creation.STEP)
            problem = self_check(
                kernel, Ready(held, check[2]), rows, hidden, x.dtype, held.device, held.key[0], pdl=check[3]
            )
            reason = vote.outcome(problem)
            held.checked[check] = reason
            if reason is not None:
                fell_back(_strategy(kernel, check, held.key), held.key[0], reason)
            synchronize(held.device)  # the check used the workspace on another stream than the call will
        return held.checked[check] is None

    def _make(self, held: Held, call: str, tokens: int, hidden: int, dtype: torch.dtype) -> Reason | None:
        """A workspace of this capacity in place of the one held; why not, the same reason on all ranks."""
        mnnvl = held.key[2]
        facts, problem = creation.facts(tokens, hidden, dtype, held.device, held.world_size, mnnvl=mnnvl)
        facts["call"] = call
        first = self.groups.agreement(held, "what a workspace needs", creation.ARRIVAL)
        try:
            problem = creation.disagreement(first.gather(facts)) or problem
        except NoAgreement as error:
            problem = error.reason
        if reason := self.groups.agreement(held, "whether to make a workspace", creation.STEP).outcome(problem):
            return reason
        made, group = None, held.group()
        failure: Reason | NoAgreement | None = None
        exchange = self.groups.agreement(held, "the exchange of a workspace's handles", creation.STEP)
        try:
            assert group is not None
            made = creation.create(exchange, group, tokens, hidden, dtype, mnnvl=mnnvl)
            synchronize(held.device)
        except NoAgreement as error:
            failure = error
        except Exception as error:  # noqa: BLE001  # whatever it is: the other ranks must hear of it
            failure = problem = Reason("workspace", f"making a workspace raised {type(error).__name__}: {error}")
            exchange.abandon(problem)
        reason = self.groups.agreement(held, "whether the workspace came up", creation.STEP).outcome(failure)
        if reason is not None:
            if made is not None:
                creation.free(made)
            return reason
        # every rank has come past its last use of the old one: they have just voted
        self.groups.forms.clear()
        held.replace(made, tokens * hidden)
        return None


def _strategy(kernel: Kernel, check: tuple[Any, ...], key: tuple[Any, ...]) -> str:
    form = "_two_shot" if check[2] is False else ""
    return f"flashinfer.{kernel.name}{form}{'_pdl' if check[3] else ''}{'_mnnvl' if key[2] else ''}"


def _entry(key: tuple[Any, ...], group: weakref.ref[dist.ProcessGroup], world_size: int, device: torch.device) -> Held:
    return Held(key, group, world_size, device)


WORKSPACES = Workspaces()
