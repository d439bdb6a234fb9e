"""A backend's workspaces: one per process group and kind, made by all ranks of the group when first needed.

Nothing is made while a CUDA graph is captured. All ranks of the group take every step together: the same calls in the
same order give them the same sizes and the same outcomes (`fusion_core.agree`). Each step has a time limit, including
those that run the backend's code. If a step raises or does not return on one rank, all ranks take the unfused path.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Generic

import torch
from torch import Tensor

from fusion_core import _cuda
from fusion_core._torch.distributed import group_by_name
from fusion_core.fallback import Status, fell_back
from fusion_core.reason import Reason
from fusion_core.workspaces.call import Call, Handle, Workspace
from fusion_core.workspaces.group_states import GroupStates
from fusion_core.workspaces.making import attempt, make
from fusion_core.workspaces.provider import Provider
from fusion_core.workspaces.self_check import why_not_used
from fusion_core.workspaces.state import GroupState
from fusion_core.workspaces.unfused import Unfused

_UNCHECKED: Any = object()


class Workspaces(Generic[Handle]):
    """All workspaces that a backend has in this process.

    Args:
        provider: Makes them and calls kernels on them.
    """

    def __init__(self, provider: Provider[Handle]) -> None:
        self.provider = provider
        self._groups = GroupStates(provider)
        self._unfused = Unfused()
        _all.add(self)

    def run(self, call: Call) -> Mapping[str, Tensor]:
        """The call's outputs by name, fused or unfused on all ranks together. They are never overwritten later."""
        # without rows no rank has anything to send
        workspace = self.ready(call) if call.tensors["x"].numel() else None
        found = None if workspace is None else self.provider.run(workspace, call)
        return self._unfused(call) if found is None else found

    def unfused(self, call: Call) -> Mapping[str, Tensor]:
        """The call's outputs by torch's all_reduce and one Inductor kernel after it, for tensors of any size.

        The first call of a pattern with these scalars compiles the kernel, which takes some seconds. If it comes during
        the capture of a CUDA graph, the operators after the all_reduce run one by one instead.
        """
        return self._unfused(call)

    def ready(self, call: Call) -> Workspace[Handle] | None:
        """The workspace for one call, made or enlarged if needed; None if all ranks run the call unfused.

        Args:
            call: The call; x is not empty.
        """
        x = call.tensors["x"]
        form = (call.pattern, call.strategy, call.kernel, call.group, x.dtype, x.shape, call.max_tokens)
        found: tuple[GroupState[Handle], Workspace[Handle]] | None = self._groups.forms.get(form)
        if found is None or group_by_name(call.group) is not found[0].group():
            state = self._groups.get((call.group, self.provider.key(call)), call.x.device)
            if not self._takes(state, call):
                return None
            found = state, state.workspace
            self._groups.remember(form, found)
        state, workspace = found
        state.enter()
        return workspace

    def status(self) -> Iterator[Status]:
        """One line for each workspace of this process, for the hook ``fusion_status``."""
        for state in self._groups:
            yield state.status()

    def release(self, group: str | None = None) -> None:
        """Give back the workspaces of one process group, or of all. CUDA graphs that use them must be gone.

        Call it on every rank of the group. The next call makes a new workspace.

        Args:
            group: The process group's name; None for every group.
        """
        self._groups.release(group)

    def _takes(self, state: GroupState[Handle], call: Call) -> bool:
        """Whether all ranks run the call's kernel on the workspace. It is made, enlarged and checked if needed."""
        check = _kernel(call)
        verdict = state.checked.get(check, _UNCHECKED)
        needed = self._needed(state, call)
        if state.failure is not None and needed > state.size:  # smaller calls still use the workspace
            verdict = state.failure
        if isinstance(verdict, Reason):  # recorded for this strategy too: another's call may have found it
            fell_back(call.strategy, call.group, verdict)
            return False
        if (needed > state.size or verdict is _UNCHECKED) and not self._prepare(state, call):
            return False
        if reason := self.provider.takes(state.workspace.handle, call):
            fell_back(call.strategy, call.group, reason)
            return False
        return True

    def _needed(self, state: GroupState[Handle], call: Call) -> int:
        """Bytes of x that the workspace must take: those of the call, and of a self-check that is still to run."""
        if _kernel(call) in state.checked:
            return call.x.nbytes
        rows, hidden = self.provider.check_shape(call)
        return max(call.x.nbytes, rows * hidden * call.x.element_size())

    def _prepare(self, state: GroupState[Handle], call: Call) -> bool:
        """Make or enlarge the workspace and check the kernel. Returns whether the call can use it."""
        if _cuda.is_capturing():
            reason: Reason | None = Reason(
                "capture",
                f"the first call of {call} came while a CUDA graph was captured",
                "one call outside of capture first",
                hint="run the model once before capturing it",
            )
        else:
            reason = self._groups.prepare(state, lambda: self._prepare_now(state, call))
        if reason is not None:
            fell_back(call.strategy, call.group, reason)
        return reason is None

    def _prepare_now(self, state: GroupState[Handle], call: Call) -> Reason | None:
        if (needed := self._needed(state, call)) > state.size:
            size = max(self.provider.room(call), needed)
            state.failure = make(self.provider, self._groups, state, call, size)
            if state.failure is not None:
                return state.failure
        check = _kernel(call)
        if check not in state.checked:
            state.checked[check] = self._checked(state, call)
        return state.checked[check]

    def _checked(self, state: GroupState[Handle], call: Call) -> Reason | None:
        """The reason why the call's kernel is not used, the same on all ranks, or None."""
        subject, step = f"the self-check of {call.strategy}", self.provider.step
        # ranks that wait for a late one outlast its own time limit
        vote = self._groups.agreement(state, subject, 2 * step)
        check = attempt(subject, "self_check", step, state, lambda: self._check(state, call))
        reason = vote.outcome(check.result if check.failure is None else check.failure)
        if reason is not None:
            vote.publish(check.ended)
            if vote.collect() not in (["returned"] * vote.size, ["raised"] * vote.size):
                # the kernel ran on some ranks only: the contents of the workspace no longer match for another call
                self._groups.forms.clear()
                state.abandon(reason)
        return reason

    def _check(self, state: GroupState[Handle], call: Call) -> Reason | None:
        """The reason why the call's kernel is not used, or None.

        It runs on its own stream: a kernel that never ends must not block the unfused path.
        """
        if state.device.type != "cuda":
            return why_not_used(self.provider, state.workspace, call, state.device)
        with torch.cuda.stream(torch.cuda.Stream(state.device)):
            found = why_not_used(self.provider, state.workspace, call, state.device)
        _cuda.synchronize(state.device)  # the check used the workspace on another stream than the call will
        return found


_all: weakref.WeakSet[Workspaces[Any]] = weakref.WeakSet()


def workspaces_of(backend: str) -> list[Workspaces[Any]]:
    """The `Workspaces` of a backend in this process, whether or not it has made a workspace."""
    return [each for each in _all if each.provider.name == backend]


def _kernel(call: Call) -> tuple[Hashable, torch.dtype]:
    """The key of a self-check: kernel and dtype."""
    return call.strategy if call.kernel is None else call.kernel, call.x.dtype
