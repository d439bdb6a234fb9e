"""The operators ``torch.ops.fusion_core.by_tokens_*``, which pick one execution path of a site when they run.

Every kernel runs through one of them. In a group of several ranks the kernel runs if all ranks are about to run the
same graph; otherwise the site runs unfused (`kernel_calls`). The operator also picks by token count if that is known
only at run time. Which strategy runs from which count on was decided at compile time, and is in the graph as text. So a
graph from the compile cache makes the same choices, and every rank compares the same count with the same text.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fusion_core._cuda import is_capturing
from fusion_core.agree.kernel_calls import Calls, calls_of
from fusion_core.config import FusionConfig
from fusion_core.dispatch import named
from fusion_core.dispatch.means import over_ranks
from fusion_core.dispatch.path import Epilogue, ExecutionPath
from fusion_core.dispatch.plan import Plan
from fusion_core.dispatch.preferences import Preferences
from fusion_core.dispatch.strides import Strides, fake_results
from fusion_core.errors import RanksDiffer
from fusion_core.groups import resolved
from fusion_core.lift.operator_call import BY_ARGUMENT
from fusion_core.match.matcher import Match
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.patterns.means import MEANS
from fusion_core.plugins.requirements import Requirement
from fusion_core.plugins.strategy import Strategy

MOST_OUTPUTS = 6
"""The schema of an operator fixes its number of results; patterns have up to five."""
NAMES = tuple(f"fusion_core::by_tokens_{count}" for count in range(1, MOST_OUTPUTS + 1))

_LIBRARY = torch.library.Library("fusion_core", "DEF")


def _asked(plan: Plan, place: int) -> tuple[Requirement, ...]:
    """The requirements that each call asks before a path runs."""
    name = plan.paths[place][1]
    if name is None or not plan.asks:
        return ()
    strategy = named.strategy_of(name)
    declared = (*strategy.requires, *strategy.worthwhile)
    return tuple(declared[each] for each in plan.asks[place])


class Runner:
    """A plan in this process, with the strategies that it names.

    Args:
        plan: The plan.
        calls: The collectives of its graph; None for a site that is run outside of a graph.
    """

    def __init__(self, plan: Plan, calls: Calls | None = None) -> None:
        self.place = plan.place
        group = resolved(self.place.group)
        if plan.rank is not None and group is not None and group.rank() != plan.rank:
            raise RanksDiffer(
                f"a graph of rank {plan.rank} of group {self.place.group!r}, which uses that rank's part of a vector, "
                f"came from the compile cache on rank {group.rank()}; needs a cache of its own for each rank "
                "(TORCHINDUCTOR_CACHE_DIR), or TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
            )
        self._calls = calls
        self._in_place = self.place.pattern in MEANS.values()
        self._kernels = tuple(name for _, name in plan.paths if name is not None)
        self.rest = Epilogue(self.place)
        self.firsts = sorted({first for first, _ in plan.paths})
        self.paths = [
            ExecutionPath(
                self.place,
                None if name is None else named.strategy_of(name),
                None if name is None else plan.settings.get(name),
                self.rest,
            )
            for _, name in plan.paths
        ]
        self._unfused = ExecutionPath(self.place, None, None, self.rest)
        asked = [
            (first, path, _asked(plan, n))
            for n, ((first, _), path) in enumerate(zip(plan.paths, self.paths, strict=True))
        ]
        self._preferences = [
            Preferences([(path, asks) for start, path, asks in asked if start == first], plan.form, self.place.group)
            for first in self.firsts
        ]
        self._prepared = not any(path.needs_rest for path in self.paths)
        self._strides = Strides(self.place)

    def __call__(self, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The live outputs, in memory of their own; x may be overwritten. What the ranks send as means is in x."""
        if x.numel() == 0:  # the same on every rank: nothing to send
            return self._strides.settled(x, others, self.place.alone(x, *others))
        if not self._prepared and not is_capturing():
            # now, not at the first larger batch: compiling takes seconds
            self.rest.prepare(x, others)
            self._prepared = True
        tokens = x.numel() // x.shape[-1] if x.dim() else 1
        path = self._preferences[max(bisect_right(self.firsts, tokens) - 1, 0)](tuple(x.shape))
        if path.strategy is not None and self._hindered():
            path = self._unfused
        results = path(x, others)
        if not self._in_place:
            return self._strides.settled(x, others, results)
        if results[0] is not x:
            x.copy_(results[0])
        return (torch.empty_like(x),)  # nothing reads it: an operator must not return its argument

    def _hindered(self) -> bool:
        """Whether the ranks of the group do not all run this graph."""
        if self._calls is None or (group := calls_of(self.place.group)) is None:
            return False
        return group.hindrance(self._calls, self._kernels) is not None


@functools.lru_cache(maxsize=1024)
def _runner(text: str, calls: str) -> Runner:
    return Runner(Plan.of(text), Calls.from_text(calls) if calls else None)


def _run(x: Tensor, others: list[Tensor], plan: str, calls: str) -> Any:
    results = _runner(plan, calls)(x, others)
    return results[0] if len(results) == 1 else results


def _fake(x: Tensor, others: list[Tensor], plan: str, calls: str) -> Any:
    results = fake_results(Plan.of(plan).place, x, others)
    return results[0] if len(results) == 1 else results


for _count in range(1, MOST_OUTPUTS + 1):
    _returns = ", ".join(["Tensor"] * _count)
    _LIBRARY.define(f"by_tokens_{_count}(Tensor(a!) x, Tensor[] others, str plan, str calls) -> ({_returns})")
    _LIBRARY.impl(f"by_tokens_{_count}", _run, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"by_tokens_{_count}", _fake, "Meta")  # not by register_fake, which looks through all loaded modules


def is_guarded(traced: fx.GraphModule) -> bool:
    """Whether a traced strategy already runs one of the operators of this module."""
    return any(node.target is BY_ARGUMENT for node in traced.graph.nodes)


def guarded(
    match: Match,
    paths: tuple[tuple[int, str | None], ...],
    used: Mapping[str, Strategy],
    config: FusionConfig,
    patterns: Mapping[str, Pattern] = MappingProxyType({}),
    asks: tuple[tuple[int, ...], ...] = (),
    form: list[Any] | None = None,
) -> Strategy:
    """The operator that picks a path when it runs, as a strategy with the name of the first one in ``paths``.

    Args:
        match: The match that it replaces.
        paths: Which strategy runs from which token count on, as in `Plan`.
        used: The strategies of ``paths`` by name.
        config: The user's configuration.
        patterns: The patterns of strategies that are not for the match's own pattern.
        asks: The requirements that each call asks before a path runs, as in `Plan`.
        form: The data from which the site of a call is made, as in `Plan`.
    """
    pattern = match.pattern
    live = tuple(match.outputs)
    if len(paths) == 1 and (only := used[str(paths[0][1])]).reduces_means:
        return _reducing_means(match, only, config)
    names = tuple(name for name in pattern.tensors if name != "x" and match.bound.get(name) is not None)
    running = {name: used[name] for _, name in paths if name is not None}
    settings = {
        name: settings
        for name, strategy in running.items()
        if (settings := strategy.settings(patterns.get(strategy.pattern, pattern), config))
    }
    constants = {name: value for name, value in match.scalars.items() if name not in pattern.tensors}
    rank = match.notes.get("rank")
    plan = Plan(pattern.name, live, names, constants, paths, settings, asks, form, rank)
    first = next(iter(running.values()))
    return replace(first, pattern=pattern.name, impl=emitted(plan, running, pattern), outputs=live, arguments={})


def _reducing_means(match: Match, strategy: Strategy, config: FusionConfig) -> Strategy:
    """A strategy that reduces means, with nothing else inside the operator."""
    pattern, live = match.pattern, tuple(match.outputs)
    sent = MEANS[pattern.collective]
    _, *names = sent.tensors
    settings = {strategy.name: given} if (given := strategy.settings(pattern, config)) else {}
    group, rank, paths = match.bound[GROUP], match.notes.get("rank"), ((1, strategy.name),)
    plan = Plan(sent.name, sent.outputs, tuple(names), {GROUP: group}, paths, settings, rank=rank)
    operator, text = _operator(plan, {strategy.name: strategy}, sent)

    def reduce(means: Tensor, parts: Sequence[Tensor], group: str) -> Tensor:
        returned: Any = BY_ARGUMENT(operator, x=means, others=list(parts), plan=text, calls="")
        summed: Tensor = returned[-1]  # x after the call
        return summed

    run = over_ranks(pattern, reduce)

    def impl(**given: Any) -> tuple[Tensor, ...]:
        results = dict(zip(pattern.outputs, run(**given), strict=True))
        return tuple(results[name] for name in live)

    return replace(strategy, impl=impl, outputs=live, arguments={}, reduces_means=False)


def _operator(plan: Plan, strategies: Mapping[str, Strategy], pattern: Pattern) -> tuple[Any, str]:
    """The operator for a plan, which then knows these strategies and the pattern by name, and the plan as text."""
    if named.know(strategies.values(), pattern):
        _runner.cache_clear()  # runners have other strategies of these names, from an earlier registry
    return getattr(torch.ops.fusion_core, f"by_tokens_{len(plan.live)}").default, plan.text()


def emitted(plan: Plan, strategies: Mapping[str, Strategy], pattern: Pattern) -> Callable[..., tuple[Tensor, ...]]:
    """The function that a graph runs for a plan: from the pattern's parameters, by name, to the live outputs.

    Args:
        plan: What runs from which token count on; its scalars are those of the site.
        strategies: The strategies of the plan, by name.
        pattern: The site's pattern.
    """
    operator, text = _operator(plan, strategies, pattern)

    def run(**given: Any) -> tuple[Tensor, ...]:
        others = [given[name] for name in plan.names]
        # x may be overwritten if nothing reads it later: Inductor finds out, and otherwise copies it
        returned: Any = BY_ARGUMENT(operator, x=given["x"], others=others, plan=text, calls="")
        return tuple(returned[: len(plan.live)])

    return run
