"""What workers do for `checks_of_workspaces`: run a strategy while its backend's `Provider` fails."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from fusion_core.fallback import fallen_back
from fusion_core.samples.tensors import Values
from fusion_core.site import Site
from fusion_core.testing.jobs import Outcome, by_name, call, compare, tensors
from fusion_core.testing.subject import Subject
from fusion_core.workspaces.lifecycle import workspaces_of
from fusion_core.workspaces.self_check import distance, exactly

STEP = 5.0
"""Seconds of a provider's steps in these workers, past the first one."""
MOST_SECONDS = 300.0
"""Of one fault: a first call may build kernels."""
STEP_AFTER_A_DEATH = 2.0
"""The same where a rank dies. A rank that is later than this falls back, which is an outcome too."""
MOST_SECONDS_AFTER_A_DEATH = 60.0
"""Of two calls on a CPU whose steps end in time."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a provider's method.

    Attributes:
        method: The method.
        how: How.
        ranks: On which ranks: the last one, or all.
    """

    method: Literal["create", "run"]
    how: Literal["raises", "is late", "is wrong", "dies"]
    ranks: Literal["last", "all"]

    def __str__(self) -> str:
        return f"{self.method} {self.how} on {'every rank' if self.ranks == 'all' else 'one rank'}"

    def of(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method with this fault."""

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self.how == "dies":
                os._exit(1)
            if self.how == "raises":
                raise RuntimeError(f"{self.method} fails for the conformance kit")
            if self.how == "is late":
                time.sleep(2 * STEP)
            found = method(*args, **kwargs)
            if self.how == "is late":
                return found
            return {name: result.flip(-1) if result.dim() else result for name, result in found.items()}

        return faulty


class Seen(NamedTuple):
    """What one rank saw of two calls: the results, and why the strategy runs unfused."""

    outcomes: list[Outcome]
    reasons: tuple[str, ...]


class Survived(NamedTuple):
    """What a rank saw of a call in which another one dies.

    Attributes:
        raised: What the call raised; empty if it returned.
        off: How far its results are from float64, in units of what their dtypes allow; 0 if it raised.
    """

    raised: str
    off: float


def makes_a_workspace(subject: Subject, site: Site, values: Values) -> bool:
    """Whether a call of the strategy makes a workspace, where there is none yet."""
    made: list[int] = []
    assert subject.strategy  # which loads the backend
    with ExitStack() as stack:
        for each in workspaces_of(subject.backend):
            each.release()
            stack.enter_context(mock.patch.object(each.provider, "create", _noted(each.provider.create, made)))
        compare(subject, site, values)
    return bool(made)


def _noted(create: Callable[..., Any], made: list[int]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        made.append(1)
        return create(*args)

    return noted


def without_workspace(subject: Subject, site: Site, values: Values, fault: Fault) -> Seen:
    """Two calls while the backend's provider has a fault, from no workspace on."""
    name = subject.strategy.name  # which loads the backend
    group = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    before = len(fallen_back(name, group))
    with _at_fault(subject, fault, STEP):
        outcomes = [compare(subject, site, values) for _ in range(2)]
    return Seen(outcomes, tuple(map(str, fallen_back(name, group)[before:])))


def where_a_rank_dies(subject: Subject, site: Site, values: Values, fault: Fault) -> list[Survived]:
    """Two calls, in which the process of a rank ends. No collective can tell then what is right."""
    strategy, pattern = subject.strategy, subject.pattern
    group = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    ranks = [tensors(site, values, shift) for shift in range(site.world_size)]
    reduced = functools.reduce(torch.add, [each["x"].double() for each in ranks])
    exact = exactly(pattern, reduced, ranks[0], site.attributes)
    found = []
    with _at_fault(subject, fault, STEP_AFTER_A_DEATH), torch.no_grad():
        for _ in range(2):
            try:
                returned = call(strategy, pattern, site, tensors(site, values), group)
            except Exception as error:  # noqa: BLE001  # torch's or the backend's: the caller learns of the death
                found.append(Survived(f"{type(error).__name__}: {error}", 0.0))
                continue
            results, problems = by_name(strategy, pattern, returned)
            live = {name: results[name] for name in (*site.outputs, "scale") if name in results}
            off = distance(pattern, live, exact, {**ranks[0], **site.attributes})
            found.append(Survived("", math.inf if problems else off))
    return found


@contextmanager
def _at_fault(subject: Subject, fault: Fault, step: float) -> Iterator[None]:
    """From no workspace on, with a provider that has a fault."""
    with ExitStack() as stack:
        for each in workspaces_of(subject.backend):
            each.release()
            provider = each.provider
            provider.step = step
            if fault.how == "dies":
                provider.making = step
            if fault.ranks == "all" or dist.get_rank() == dist.get_world_size() - 1:
                if fault.method == "create" and fault.how == "is late":
                    provider.making = step
                method = fault.of(getattr(provider, fault.method))
                stack.enter_context(mock.patch.object(provider, fault.method, method))
        yield
