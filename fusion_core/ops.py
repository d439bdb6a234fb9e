"""Each pattern as an eager function, for code that calls fused kernels by hand.

``fusion_core.ops.all_reduce_add_rms_norm(x, residual, weight, eps, group=group)`` runs the best usable strategy for
these tensors. Under ``torch.compile`` it is the pattern's plain definition, which the pass then matches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fusion_core._torch.tensors import FakeTensorMode
from fusion_core.agree.kernel_calls import Calls, calls_of
from fusion_core.agree.ranks import agree
from fusion_core.config import FusionConfig
from fusion_core.decide.eligibility import evaluate
from fusion_core.decide.measured import timing
from fusion_core.decide.ranking import Usable, rank_indices
from fusion_core.dispatch.means import function_of
from fusion_core.errors import BackendError, ConfigError, blame
from fusion_core.groups import group_name, resolved, world_size
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import GROUP, VECTORS, Pattern
from fusion_core.plugins.asking import Answers
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Stage
from fusion_core.site import Device, Site, TensorMeta

_registry_for = functools.lru_cache(maxsize=64)(Registry.load)


def eager(pattern: Pattern) -> Callable[..., Any]:
    """The eager function of a pattern."""

    def call(
        *args: Any,
        group: torch.distributed.ProcessGroup | str | None = None,
        config: FusionConfig | None = None,
        outputs: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        wanted = tuple(pattern.returns if outputs is None else outputs)
        if not wanted or not set(wanted) <= set(pattern.outputs):
            raise ConfigError(f"outputs are {wanted}, needs some of {pattern.outputs}")
        bound = pattern.bind(args, kwargs)
        name = group_name(group)
        if torch.compiler.is_compiling():
            given = pattern.function(**bound, **{GROUP: name})
            names = pattern.outputs
        else:
            _check(pattern, bound)
            config = FusionConfig() if config is None else config
            strategy, calls = _choose(pattern, bound, name, wanted, config)
            if calls is not None and (known := calls_of(name)) and known.hindrance(calls, (strategy.name,)):
                strategy = _unfused(pattern)
            accepted = strategy.accepts(pattern)
            scalars = {key: value for key, value in bound.items() if key in pattern.scalars and key in accepted}
            tensors = {key: bound[key] for key in pattern.tensors}
            if GROUP in accepted:
                scalars[GROUP] = name
            try:
                given = function_of(strategy, pattern)(**tensors, **scalars, **strategy.settings(pattern, config))
            except BaseException as error:
                blame(error, strategy.name, f"fusion_core.ops.{pattern.name} of {tuple(bound['x'].shape)}")
                raise
            names = strategy.outputs or pattern.outputs
        results = dict(zip(names, given if isinstance(given, tuple | list) else (given,), strict=True))
        return results[wanted[0]] if len(wanted) == 1 else tuple(results[each] for each in wanted)

    functools.update_wrapper(call, pattern.function)
    return call


def _check(pattern: Pattern, bound: dict[str, Any]) -> None:
    """Raise if the tensors do not fit each other; in a graph, tracing would have found it."""
    x = bound["x"]
    for name in pattern.tensors:
        tensor = bound[name]
        if tensor is None and not pattern.parameters[name].optional:
            raise ConfigError(f"{pattern.name}: {name} is None, needs a tensor")
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{pattern.name}: {name} is {type(tensor).__name__}, needs a tensor")
        if not tensor.is_floating_point():
            raise ConfigError(f"{pattern.name}: {name} is {tensor.dtype}, needs a floating dtype")
        if tensor.device != x.device:
            raise ConfigError(
                f"{pattern.name}: {name} is on {tensor.device} and x on {x.device}, needs one device for all"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ConfigError(
                f"{pattern.name}: {name} requires grad, needs torch.no_grad(): fused collectives have no backward"
            )
        if name in pattern.elementwise and tensor.shape != x.shape:
            raise ConfigError(f"{pattern.name}: {name} has shape {tuple(tensor.shape)}, needs x's, {tuple(x.shape)}")
        if name in VECTORS and (x.dim() == 0 or tensor.shape != x.shape[-1:]):
            raise ConfigError(
                f"{pattern.name}: {name} has shape {tuple(tensor.shape)}, needs x's last size, {tuple(x.shape[-1:])}"
            )


def _choose(
    pattern: Pattern, bound: dict[str, Any], group: str, wanted: tuple[str, ...], config: FusionConfig
) -> tuple[Strategy, Calls | None]:
    """The best usable strategy for these tensors, and the call that ranks check first; cached per shape and dtype."""
    tensors = [(name, TensorMeta.of(bound[name])) for name in pattern.tensors if bound[name] is not None]
    scalars = [(name, bound[name]) for name in pattern.scalars]
    key = (pattern.name, tuple(tensors), tuple(scalars), bound["x"].device, wanted, config)
    known = resolved(group)
    assert known is not None
    chosen = _chosen.setdefault(known, {})  # keyed by the group, not its name: a later group may reuse the name
    if key not in chosen:
        strategy = _decide(pattern, bound, dict(tensors), group, wanted, config)
        words = f"{strategy.name} in fusion_core.ops.{pattern.name}"
        form = [f"{name} {meta}" for name, meta in tensors] + [f"{scalars} {wanted}", words]
        chosen[key] = strategy, None if strategy.impl is pattern.function else Calls.of(form, words)
    return chosen[key]


_chosen: WeakKeyDictionary[torch.distributed.ProcessGroup, dict[Any, tuple[Strategy, Calls | None]]] = (
    WeakKeyDictionary()
)


def _unfused(pattern: Pattern) -> Strategy:
    return Strategy(pattern.name, "unfused.definition", pattern.function)


def _decide(
    pattern: Pattern,
    bound: dict[str, Any],
    inputs: dict[str, TensorMeta],
    group: str,
    wanted: tuple[str, ...],
    config: FusionConfig,
) -> Strategy:
    whole = _registry_for(config)
    common = agree((group,), whole)
    registry = common.registry(whole, group)
    size = world_size(group)
    assert size is not None
    mode = FakeTensorMode()
    with mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in bound.items()
        }
        given = pattern.function(**fakes, **{GROUP: group})
    results = dict(zip(pattern.outputs, given if isinstance(given, tuple) else (given,), strict=True))
    outputs = {name: TensorMeta.of(results[name]) for name in wanted}
    scalars = {name: bound[name] for name in pattern.scalars}
    site = Site(pattern.name, "ops", inputs, outputs, scalars, Device.of(bound["x"].device), size, group)
    reasons: list[str] = []
    usable: list[Usable] = []
    answers = Answers(site)
    for strategy in registry.strategies(pattern.name):
        found = timing(registry, strategy, pattern, site, site.tokens or 0)
        stage, why = evaluate(strategy, pattern, answers, registry, found)
        if stage is Stage.CHOSEN:
            usable.append((strategy, pattern, found))
        reasons.extend(f"{strategy.name}: {reason}" for reason in why)
    if not usable and common.reasons([group]):  # there has been a warning, and the other ranks do the same
        return _unfused(pattern)
    if not usable:
        raise BackendError(
            f"no strategy can run {pattern.name} here: {'; '.join(reasons) or 'no backend in use has one'}"
        )
    return usable[rank_indices(registry, usable)[0]][0]


for _pattern in CORE_PATTERNS:
    globals()[_pattern.name] = eager(_pattern)

__all__ = [_pattern.name for _pattern in CORE_PATTERNS]
