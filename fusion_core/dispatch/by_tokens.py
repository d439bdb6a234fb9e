"""The operators ``torch.ops.fusion_core.by_tokens_*``: one place run one way or another, decided when it runs.

For every kernel in a group of several ranks. It runs where all ranks are about to run the same graph, and unfused
where they are not (`kernel_calls`). Where the token count is known only at run time, it decides too: what runs from
which count on was decided when the graph was compiled, and is in the graph as text. So a graph from the compile cache
decides alike, and every rank compares the same count with the same text.
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
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from fusion_core.agree.kernel_calls import Calls, calls_of
from fusion_core.config import FusionConfig
from fusion_core.dispatch.path import Path, Place, Rest
from fusion_core.dispatch.preferences import Preferences
from fusion_core.errors import BackendError
from fusion_core.match.matcher import Match
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.requirements import Requirement
from fusion_core.plugins.strategy import Strategy
from fusion_core.workspaces.per_group import capturing

MOST_OUTPUTS = 6
"""An operator's schema says how many results it has; patterns have up to five."""
NAMES = tuple(f"fusion_core::by_tokens_{count}" for count in range(1, MOST_OUTPUTS + 1))

_LIBRARY = torch.library.Library("fusion_core", "DEF")

_strategies: dict[str, Strategy] = {}
_patterns: dict[str, Pattern] = {pattern.name: pattern for pattern in CORE_PATTERNS}


@dataclass(frozen=True)
class Plan:
    """What runs at a place, from which token count on.

    Attributes:
        pattern: The pattern's name.
        live: The outputs that are wanted.
        names: The tensors beside x.
        scalars: The pattern's scalars, the process group among them.
        paths: The token counts from which on another strategy runs, and its name; None for torch's all_reduce. Of
            several from one count on, the first runs whose requirements the call meets.
        settings: Strategy → what the user set that it takes.
        asks: For each path the requirements that each call asks, as places in the strategy's ``requires`` and, behind
            them, ``worthwhile``. Empty where none asks any.
        form: What the site of a call is made of (`fusion_core.site.run_time`); None where no path asks anything.
    """

    pattern: str
    live: tuple[str, ...]
    names: tuple[str, ...]
    scalars: Mapping[str, Any]
    paths: tuple[tuple[int, str | None], ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    asks: tuple[tuple[int, ...], ...] = ()
    form: list[Any] | None = None

    @property
    def place(self) -> Place:
        """The pattern with everything bound but its tensors."""
        scalars = {name: value for name, value in self.scalars.items() if name != GROUP}
        return Place(pattern_of(self.pattern), self.live, self.names, scalars, self.scalars[GROUP])

    def text(self) -> str:
        """As JSON, the same for equal plans."""
        return json.dumps(
            [
                self.pattern,
                self.live,
                self.names,
                {name: _said(value) for name, value in self.scalars.items()},
                self.paths,
                self.settings,
                self.asks,
                self.form,
            ],
            separators=(",", ":"),
        )

    def without_group(self) -> Plan:
        """The plan as ranks compare it, which may call one group by several names."""
        return replace(self, scalars={name: value for name, value in self.scalars.items() if name != GROUP})

    @classmethod
    def of(cls, text: str) -> Plan:
        """The plan that `text` gave."""
        pattern, live, names, scalars, paths, settings, asks, form = json.loads(text)
        return cls(
            pattern,
            tuple(live),
            tuple(names),
            {name: _heard(value) for name, value in scalars.items()},
            tuple((first, strategy) for first, strategy in paths),
            settings,
            tuple(map(tuple, asks)),
            form,
        )


def _said(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a scalar is {value!r}, needs a number, text, a dtype or None")


def _heard(value: Any) -> Any:
    return getattr(torch, value["dtype"]) if isinstance(value, dict) else value


def _asked(plan: Plan, place: int) -> tuple[Requirement, ...]:
    """What each call asks before a path runs."""
    name = plan.paths[place][1]
    if name is None or not plan.asks:
        return ()
    strategy = strategy_of(name)
    declared = (*strategy.requires, *strategy.worthwhile)
    return tuple(declared[each] for each in plan.asks[place])


class Runner:
    """A plan in this process, with the strategies behind its names.

    Args:
        plan: The plan.
        calls: The collectives of the graph that it is in; None for a place that is tried by itself.
    """

    def __init__(self, plan: Plan, calls: Calls | None = None) -> None:
        self.place = plan.place
        self._calls = calls
        self._kernels = tuple(name for _, name in plan.paths if name is not None)
        self.rest = Rest(self.place)
        self.firsts = sorted({first for first, _ in plan.paths})
        self.paths = [
            Path(
                self.place,
                None if name is None else strategy_of(name),
                None if name is None else plan.settings.get(name),
                self.rest,
            )
            for _, name in plan.paths
        ]
        self._unfused = Path(self.place, None, None, self.rest)
        asked = [
            (first, path, _asked(plan, n))
            for n, ((first, _), path) in enumerate(zip(plan.paths, self.paths, strict=True))
        ]
        self._preferences = [
            Preferences([(path, asks) for start, path, asks in asked if start == first], plan.form, self.place.group)
            for first in self.firsts
        ]
        self._prepared = not any(path.needs_rest for path in self.paths)
        self._strides: dict[Any, tuple[tuple[int, ...], ...]] = {}

    def __call__(self, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The live outputs, in memory of their own; x may be overwritten."""
        if x.numel() == 0:  # on every rank alike: nothing to send
            return self._settled(x, others, self.place.rest(x.clone(), *others))
        if not self._prepared and not capturing():
            # now and not when a larger batch comes: compiling takes seconds
            self.rest.prepare(x, others)
            self._prepared = True
        tokens = x.numel() // x.shape[-1] if x.dim() else 1
        path = self._preferences[max(bisect_right(self.firsts, tokens) - 1, 0)](tuple(x.shape))
        if path.strategy is not None and self._hindered():
            path = self._unfused
        return self._settled(x, others, path(x, others))

    def _hindered(self) -> bool:
        """Whether the ranks of the group do not all run this graph."""
        if self._calls is None or (group := calls_of(self.place.group)) is None:
            return False
        return group.hindrance(self._calls, self._kernels) is not None

    def _settled(self, x: Tensor, others: Sequence[Tensor], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results with the strides that the graph was compiled for: kernels behind it take them for granted."""
        if "scale" not in self.place.live and all(result.is_contiguous() for result in results):
            return results
        key = x.shape
        if key not in self._strides:
            self._strides[key] = tuple(fake.stride() for fake in _fakes(self.place, x, others))
        return tuple(
            result if result.stride() == strides else _restrided(result, strides)
            for result, strides in zip(results, self._strides[key], strict=True)
        )


def _restrided(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)


def _fakes(place: Place, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the definition gives for tensors of these forms, without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return _results(place, mode.from_tensor(x), [mode.from_tensor(other) for other in others])


def _results(place: Place, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The definition's results on fake tensors: contiguous, but for scales, whose layout is a part of the pattern."""
    results = place.definition(x.contiguous(), *(other.contiguous() for other in others))
    return tuple(
        result if name == "scale" else result.contiguous() for name, result in zip(place.live, results, strict=True)
    )


def strategy_of(name: str) -> Strategy:
    """The strategy of a name: one that a plan of this process uses, else an installed backend's.

    Raises:
        BackendError: where there is none.
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
        BackendError: where there is none.
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
    results = _results(Plan.of(plan).place, x, others)
    return results[0] if len(results) == 1 else results


for _count in range(1, MOST_OUTPUTS + 1):
    _returns = ", ".join(["Tensor"] * _count)
    _LIBRARY.define(f"by_tokens_{_count}(Tensor(a!) x, Tensor[] others, str plan, str calls) -> ({_returns})")
    _LIBRARY.impl(f"by_tokens_{_count}", _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusion_core::by_tokens_{_count}", _fake, lib=_LIBRARY)


def is_guarded(traced: fx.GraphModule) -> bool:
    """Whether a traced strategy is one of the operators of this module already."""
    return any(node.target is auto_functionalized for node in traced.graph.nodes)


def guarded(
    match: Match,
    paths: tuple[tuple[int, str | None], ...],
    used: Mapping[str, Strategy],
    config: FusionConfig,
    patterns: Mapping[str, Pattern] = MappingProxyType({}),
    asks: tuple[tuple[int, ...], ...] = (),
    form: list[Any] | None = None,
) -> Strategy:
    """The operator that picks when it runs, as a strategy by the name of the first that it picks.

    Args:
        match: The place.
        paths: The token counts from which on another strategy runs, and its name; None for torch's all_reduce.
        used: The strategies of ``paths`` by name.
        config: What the user set.
        patterns: Those of strategies that are not for the place's own pattern.
        asks: What each call asks before a path runs, as in `Plan`.
        form: What the site of a call is made of, as in `Plan`.
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
    plan = Plan(pattern.name, live, names, constants, paths, settings, asks, form)
    first = next(iter(running.values()))
    return replace(first, pattern=pattern.name, impl=emitted(plan, running, pattern), outputs=live)


def emitted(plan: Plan, strategies: Mapping[str, Strategy], pattern: Pattern) -> Callable[..., tuple[Tensor, ...]]:
    """What a graph gets for a plan: a function of the pattern's parameters by name to the live outputs.

    Args:
        plan: What runs from which token count on; its scalars are those of the place.
        strategies: Those of the plan, by name.
        pattern: The place's pattern.
    """
    if any(_strategies.get(name, strategy) is not strategy for name, strategy in strategies.items()):
        _runner.cache_clear()  # other strategies of these names, of a registry that is gone
    _strategies.update(strategies)
    _patterns[pattern.name] = pattern
    operator = getattr(torch.ops.fusion_core, f"by_tokens_{len(plan.live)}").default
    text = plan.text()

    def run(**given: Any) -> tuple[Tensor, ...]:
        others = [given[name] for name in plan.names]
        # x may be overwritten where nobody needs it any more: Inductor finds out, and copies it where somebody does
        returned: Any = auto_functionalized(operator, x=given["x"], others=others, plan=text, calls="")
        return tuple(returned[: len(plan.live)])

    return run
