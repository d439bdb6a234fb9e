"""The operators ``torch.ops.fusion_core.by_tokens_*``, which pick one execution path of a site when they run.

Every kernel runs through one of them. In a group of several ranks the kernel runs if all ranks are about to run the
same graph; otherwise the site runs unfused (`kernel_calls`). The operator also picks by token count if that is known
only at run time. Which strategy runs from which count on was decided at compile time, and is in the graph as text. So a
graph from the compile cache makes the same choices, and every rank compares the same count with the same text.
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from fusion_core._cuda import is_capturing
from fusion_core._json.values import decode_scalar, encode_scalar
from fusion_core.agree.kernel_calls import Calls, calls_of
from fusion_core.config import FusionConfig
from fusion_core.dispatch.path import BoundPattern, Epilogue, ExecutionPath
from fusion_core.dispatch.preferences import Preferences
from fusion_core.dispatch.strides import Strides, fake_results
from fusion_core.errors import BackendError, RanksDiffer
from fusion_core.groups import resolved
from fusion_core.lift.operator_call import BY_ARGUMENT
from fusion_core.match.matcher import Match
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.requirements import Requirement
from fusion_core.plugins.strategy import Strategy

MOST_OUTPUTS = 6
"""The schema of an operator fixes its number of results; patterns have up to five."""
NAMES = tuple(f"fusion_core::by_tokens_{count}" for count in range(1, MOST_OUTPUTS + 1))

_LIBRARY = torch.library.Library("fusion_core", "DEF")

_strategies: dict[str, Strategy] = {}
_patterns: dict[str, Pattern] = {pattern.name: pattern for pattern in CORE_PATTERNS}


@dataclass(frozen=True)
class Plan:
    """What runs at a site from which token count on.

    Attributes:
        pattern: The pattern's name.
        live: The outputs that are used.
        names: The tensors besides x.
        scalars: The pattern's scalars, including the process group.
        paths: Pairs of a token count and the name of the strategy that runs from it on; None for torch's all_reduce. Of
            several paths from one count on, the first runs whose requirements the call meets.
        settings: Strategy → the user's settings that it takes.
        asks: For each path the requirements that each call asks, as indices into the strategy's
            ``requires + worthwhile``. Empty if no path asks any.
        form: The data from which the site of a call is made (`fusion_core.site.run_time`); None if no path asks any.
        rank: The rank whose part of a vector the graph uses; None for a pattern that is alike on all ranks.
    """

    pattern: str
    live: tuple[str, ...]
    names: tuple[str, ...]
    scalars: Mapping[str, Any]
    paths: tuple[tuple[int, str | None], ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asks: tuple[tuple[int, ...], ...] = ()
    form: list[Any] | None = None
    rank: int | None = None

    @property
    def place(self) -> BoundPattern:
        """The pattern with everything bound but its tensors."""
        scalars = {name: value for name, value in self.scalars.items() if name != GROUP}
        return BoundPattern(pattern_of(self.pattern), self.live, self.names, scalars, self.scalars[GROUP])

    def text(self) -> str:
        """As JSON, the same for equal plans."""
        return json.dumps(
            [
                self.pattern,
                self.live,
                self.names,
                {name: encode_scalar(value) for name, value in self.scalars.items()},
                self.paths,
                self.settings,
                self.asks,
                self.form,
                self.rank,
            ],
            separators=(",", ":"),
        )

    def without_group(self) -> Plan:
        """The plan as ranks compare it: they may have several names for one group, and each is another rank."""
        return replace(self, scalars={name: value for name, value in self.scalars.items() if name != GROUP}, rank=None)

    @classmethod
    def of(cls, text: str) -> Plan:
        """The plan that `text` serialized."""
        pattern, live, names, scalars, paths, settings, asks, form, rank = json.loads(text)
        return cls(
            pattern,
            tuple(live),
            tuple(names),
            {name: decode_scalar(value) for name, value in scalars.items()},
            tuple((first, strategy) for first, strategy in paths),
            settings,
            tuple(map(tuple, asks)),
            form,
            rank,
        )


def _asked(plan: Plan, place: int) -> tuple[Requirement, ...]:
    """The requirements that each call asks before a path runs."""
    name = plan.paths[place][1]
    if name is None or not plan.asks:
        return ()
    strategy = strategy_of(name)
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
        self._kernels = tuple(name for _, name in plan.paths if name is not None)
        self.rest = Epilogue(self.place)
        self.firsts = sorted({first for first, _ in plan.paths})
        self.paths = [
            ExecutionPath(
                self.place,
                None if name is None else strategy_of(name),
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
        """The live outputs, in memory of their own; x may be overwritten."""
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
        return self._strides.settled(x, others, path(x, others))

    def _hindered(self) -> bool:
        """Whether the ranks of the group do not all run this graph."""
        if self._calls is None or (group := calls_of(self.place.group)) is None:
            return False
        return group.hindrance(self._calls, self._kernels) is not None


def strategy_of(name: str) -> Strategy:
    """The strategy of a name: one that a plan of this process uses, else an installed backend's.

    Raises:
        BackendError: if there is none.
    """
    if name not in _strategies:
        registry = _installed()
        _strategies.update({s.name: s for each in registry.patterns for s in registry.strategies(each)})
    if name not in _strategies:
        raise BackendError(
            f"a compiled graph runs {name}, which no installed backend has; compile it anew with "
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
        )
    return _strategies[name]


def pattern_of(name: str) -> Pattern:
    """The pattern of a name: core's, one of a plan of this process, or an installed backend's.

    Raises:
        BackendError: if there is none.
    """
    if name not in _patterns:
        _patterns.update(_installed().patterns)
    if name not in _patterns:
        raise BackendError(f"a compiled graph has a place of pattern {name!r}, which no installed backend has")
    return _patterns[name]


@functools.cache
def _installed() -> Registry:
    return Registry.load(FusionConfig(order=None, strict=False, options=()))


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


def emitted(plan: Plan, strategies: Mapping[str, Strategy], pattern: Pattern) -> Callable[..., tuple[Tensor, ...]]:
    """The function that a graph runs for a plan: from the pattern's parameters, by name, to the live outputs.

    Args:
        plan: What runs from which token count on; its scalars are those of the site.
        strategies: The strategies of the plan, by name.
        pattern: The site's pattern.
    """
    if any(_strategies.get(name, strategy) is not strategy for name, strategy in strategies.items()):
        _runner.cache_clear()  # runners have other strategies of these names, from an earlier registry
    _strategies.update(strategies)
    _patterns[pattern.name] = pattern
    operator = getattr(torch.ops.fusion_core, f"by_tokens_{len(plan.live)}").default
    text = plan.text()

    def run(**given: Any) -> tuple[Tensor, ...]:
        others = [given[name] for name in plan.names]
        # x may be overwritten if nothing reads it later: Inductor finds out, and otherwise copies it
        returned: Any = BY_ARGUMENT(operator, x=given["x"], others=others, plan=text, calls="")
        return tuple(returned[: len(plan.live)])

    return run
