"""How the ranks of a group make one workspace together: compare, vote, make, vote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch

from fusion_core import _cuda
from fusion_core.agree.agreement import Agreement, NoAgreement
from fusion_core.reason import Reason
from fusion_core.workspaces.call import Call, Handle
from fusion_core.workspaces.deadline import TooLate, within
from fusion_core.workspaces.facts import difference, facts_of, unreachable
from fusion_core.workspaces.group_states import GroupStates
from fusion_core.workspaces.provider import Exchange, Provider
from fusion_core.workspaces.state import GroupState, give_back

T = TypeVar("T")

Facts = Mapping[str, Any]
Failure = Reason | NoAgreement | None


def make(
    provider: Provider[Handle], groups: GroupStates[Handle], state: GroupState[Handle], call: Call, size: int
) -> Reason | None:
    """Make a workspace that replaces the current one. Returns the reason if that failed, the same on all ranks.

    Args:
        provider: Makes it.
        groups: The backend's states of all groups.
        state: Its state of this group.
        call: The first call that needs the workspace.
        size: Bytes of x that it must take.
    """
    group = state.group()
    assert group is not None
    own = _facts(provider, state, call, size)
    first = groups.agreement(state, "what a workspace needs", provider.arrival)
    ranks, failure = _compared(first, own, provider, state)
    # nothing is made before every rank can make it: one that stayed away would leave the others waiting
    if reason := groups.agreement(state, "whether to make a workspace", provider.step).outcome(failure):
        return reason
    subject = groups.numbered(group, "the exchange of a workspace's handles")
    exchange = Exchange(group, subject, provider.step)
    exchange.group, exchange.facts = group, ranks

    def create() -> Handle:
        made = provider.create(call, size, exchange)
        _cuda.synchronize(state.device)
        return made

    def free(made: Handle) -> None:
        give_back(provider, made)

    made = attempt("making a workspace", "workspace", provider.making, state, create, free)
    if isinstance(made.failure, Reason):
        exchange.abandon(made.failure)
    # ranks that wait for a late one outlast its own time limit
    last = groups.agreement(state, "whether the workspace came up", provider.making + provider.step)
    if reason := last.outcome(made.failure):
        if made.result is not None:
            give_back(provider, made.result)
        return reason
    assert made.result is not None
    # every rank has just voted, so it is past its last use of the old workspace
    groups.forms.clear()
    state.replace(made.result, size)
    return None


class Attempt(NamedTuple, Generic[T]):
    """The outcome of a backend's code.

    Attributes:
        result: Its result; None if it did not return.
        failure: Why it did not return; None if it did.
        ended: Whether it returned, raised or exceeded its time limit.
    """

    result: T | None
    failure: Failure
    ended: Literal["returned", "raised", "late"]


def attempt(
    what: str,
    code: str,
    seconds: float,
    state: GroupState[Any],
    work: Callable[[], T],
    late: Callable[[T], Any] = lambda found: None,
) -> Attempt[T]:
    """Run a backend's code with a time limit.

    Args:
        what: The work, as a phrase for the reason.
        code: The reason's code.
        seconds: The time limit.
        state: The group's state; its device becomes the current one.
        work: The function to run.
        late: Called with the result of ``work`` if it returns after the limit.
    """

    def run() -> T:
        if state.device.type == "cuda":
            torch.cuda.set_device(state.device)
        return work()

    try:
        return Attempt(within(seconds, run, late), None, "returned")
    except NoAgreement as error:
        return Attempt(None, error, "raised")
    except TooLate:
        return Attempt(None, Reason(code, f"{what} did not end within {seconds:g} s"), "late")
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is: the other ranks must learn of it
        return Attempt(None, Reason(code, f"{what} raised {type(error).__name__}: {error}"), "raised")


def _facts(
    provider: Provider[Handle], state: GroupState[Handle], call: Call, size: int
) -> tuple[dict[str, Any], Reason | None]:
    """The facts that this rank sends to the others, and why it cannot make a workspace."""

    def ask() -> tuple[dict[str, Any], Reason | None]:
        found, problem = provider.facts(call, size)
        return facts_of(call) | found, problem

    found = attempt("asking for a workspace's facts", "workspace", provider.arrival, state, ask)
    if found.result is not None:
        return found.result
    return {}, found.failure.reason if isinstance(found.failure, NoAgreement) else found.failure


def _compared(
    first: Agreement, own: tuple[dict[str, Any], Reason | None], provider: Provider[Any], state: GroupState[Any]
) -> tuple[Sequence[Facts], Failure]:
    """The facts of all ranks, and why they cannot make a workspace: a problem of one rank, or a difference."""
    try:
        collected = first.gather(own)
    except NoAgreement as error:
        return (), error
    for rank, (_, problem) in enumerate(collected):
        if problem is not None:
            return (), NoAgreement(replace(problem, found=f"rank {rank}: {problem.found}"))
    ranks = [found for found, _ in collected]
    if reason := difference(ranks, provider.may_differ):
        return (), NoAgreement(reason)
    return ranks, unreachable(ranks, state.device)
