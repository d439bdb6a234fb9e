"""The measurements to make: the patterns, the paths of each, and the form of site at which each path is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fusion_core.dispatch.bound_pattern import BARE, BoundPattern
from fusion_core.dispatch.path import Epilogue, ExecutionPath
from fusion_core.errors import FusionError
from fusion_core.groups import AllReduce
from fusion_core.patterns.definition import VECTORS, Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.requirements import Attribute
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.samples.sites import SCALES, example_site, resized, with_outputs
from fusion_core.samples.tensors import AMAX, vector
from fusion_core.site import Device, Site
from fusion_core.tables.schema import base_line

IMPORTANT = (
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_static_fp8",
    "all_reduce_rms_norm",
    "all_reduce",
    "all_reduce_add_rms_norm_token_fp8",
    "all_reduce_rms_norm_token_fp8",
    "all_reduce_add_rms_norm_group_fp8",
    "all_reduce_rms_norm_group_fp8",
)
"""Patterns that are measured before others, the most frequent in models first."""
ALWAYS = 4
"""The first of them are measured if anything is measured at all; the others only if a strategy exists for them."""


@dataclass(frozen=True)
class Form:
    """A site without its tensors: the live outputs, in the pattern's order, and the scalars by name."""

    live: tuple[str, ...]
    scalars: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Column:
    """One path of a pattern, and the form of site at which it is measured.

    Attributes:
        strategy: The strategy; None for an unfused path.
        form: The form.
        collective: The operator of an unfused path's all_reduce; None for torch's.
    """

    strategy: Strategy | None
    form: Form
    collective: str | None = None

    @property
    def name(self) -> str:
        """Its name in the table."""
        return base_line(self.collective) if self.strategy is None else self.strategy.name


class Plan:
    """The paths of every pattern for one process group, device and dtype.

    Args:
        registry: The strategies; those whose option is not switched on are left out.
        dtype: The dtype of x.
        device: This rank's device.
        group: The process group's name.
        world_size: Its number of ranks.
        collectives: All_reduces that have an unfused path of their own beside torch's, by their operators.
    """

    def __init__(
        self,
        registry: Registry,
        dtype: torch.dtype,
        device: torch.device,
        group: str,
        world_size: int,
        collectives: Mapping[str, AllReduce] = MappingProxyType({}),
    ) -> None:
        self.registry = registry
        self.dtype = dtype
        self.device = device
        self.collectives = collectives
        self._facts = Device.of(device)
        self._group = group
        self._world_size = world_size
        self._rests: dict[tuple[str, Form], Epilogue] = {}

    def patterns(self, hidden: Iterable[int], tokens: int) -> tuple[Pattern, ...]:
        """The patterns worth measuring at any of these hidden sizes, the most frequent in models first."""
        sizes = list(hidden)
        own = [
            pattern
            for pattern in self.registry.patterns.values()
            if pattern.collective == BARE  # what is compared is the all_reduce with the rest behind it
            and any(self._can(strategy, pattern, size, tokens) for strategy in self._own(pattern) for size in sizes)
        ]
        always = [self.registry.patterns[name] for name in IMPORTANT[:ALWAYS]]
        return tuple(self.sorted({*own, *always} if own else ()))

    def sorted(self, patterns: Iterable[Pattern]) -> list[Pattern]:
        """Patterns in the order in which they are measured."""
        last = len(IMPORTANT)
        places = {name: place for place, name in enumerate(IMPORTANT)}
        return sorted(patterns, key=lambda p: (places.get(p.name, last), len(p.steps), p.name))

    def columns(self, pattern: Pattern) -> tuple[Column, ...]:
        """Every path of a pattern on this device, the unfused ones first; some may refuse some sizes."""
        own = [(strategy, self._form(strategy, pattern)) for strategy in self._own(pattern)]
        main = self._main(pattern, [form for _, form in own])
        bare = [] if pattern.name == BARE else [(strategy, main) for strategy in self._strategies(BARE)]
        unfused = (Column(None, main, collective) for collective in (None, *self.collectives))
        return (*unfused, *(Column(strategy, form) for strategy, form in (*own, *bare)))

    def site(self, pattern: Pattern, form: Form, hidden: int, tokens: int) -> Site:
        """The site of a form and a size.

        Raises:
            Impossible: if the definition does not accept the size.
            PatternError: if the pattern has parameters without an example.
        """
        site = example_site(pattern, device=self._facts, world_size=self._world_size)
        floats = ("x", *pattern.elementwise, *VECTORS)
        inputs = {
            name: replace(meta, dtype=self.dtype) if name in floats else meta for name, meta in site.inputs.items()
        }
        site = replace(site, inputs=inputs, attributes=dict(form.scalars), group=self._group)
        return with_outputs(pattern, resized(pattern, site, (tokens, hidden)), form.live)

    def refusals(self, column: Column, pattern: Pattern, site: Site) -> tuple[Reason, ...]:
        """The reasons why a path cannot run a site. Whether it is worthwhile is not checked."""
        strategy = column.strategy
        if strategy is None:
            return ()
        if strategy.pattern == pattern.name:
            return strategy.cannot(site, pattern)
        bare = self.registry.patterns[BARE]
        x = site.inputs["x"]
        return strategy.cannot(
            replace(site, pattern=BARE, inputs={"x": x}, outputs={"reduced": x}, attributes={}), bare
        )

    def path(self, column: Column, pattern: Pattern, site: Site) -> ExecutionPath:
        """The path itself; the paths of one form share the code after the all_reduce."""
        rest = self.rest(pattern, column.form, site)
        settings = {} if column.strategy is None else self._settings(column.strategy, pattern)
        return ExecutionPath(rest.place, column.strategy, settings, rest)

    def rest(self, pattern: Pattern, form: Form, site: Site) -> Epilogue:
        """The code after the all_reduce at sites of this form: one object for all sizes, so it is compiled once."""
        key = pattern.name, form
        if key not in self._rests:
            names = tuple(name for name in pattern.tensors if name in site.inputs and name != "x")
            self._rests[key] = Epilogue(BoundPattern(pattern, form.live, names, dict(form.scalars), self._group))
        return self._rests[key]

    def _settings(self, strategy: Strategy, pattern: Pattern) -> dict[str, Any]:
        own = self.registry.patterns[strategy.pattern] if strategy.pattern != pattern.name else pattern
        return strategy.settings(own, self.registry.config)

    def _strategies(self, pattern: str) -> list[Strategy]:
        """The usable strategies, except the pattern's own definition, which is the unfused path."""
        return [
            strategy
            for strategy in self.registry.strategies(pattern)
            if not strategy.is_definition(self.registry.patterns[pattern])
            and not strategy.switched_off(self.registry.config)
            and not self.registry.unavailable(strategy.backend, self._facts)
        ]

    def _own(self, pattern: Pattern) -> list[Strategy]:
        return self._strategies(pattern.name)

    def _can(self, strategy: Strategy, pattern: Pattern, hidden: int, tokens: int) -> bool:
        try:
            site = self.site(pattern, self._form(strategy, pattern), hidden, tokens)
        except FusionError:
            return False
        return not strategy.cannot(site, pattern)

    def _form(self, strategy: Strategy, pattern: Pattern) -> Form:
        """The form that a strategy is made for: all its outputs are live, and it accepts the scalars' values."""
        live = pattern.returns if strategy.outputs is None else strategy.outputs
        scalars = _scalars(pattern)
        for each in (*strategy.implied(pattern), *strategy.requires):
            if isinstance(each, Attribute) and each.name in scalars and scalars[each.name] not in each.values:
                scalars[each.name] = each.values[0]
        return Form(tuple(name for name in pattern.outputs if name in live), tuple(scalars.items()))

    def _main(self, pattern: Pattern, forms: Iterable[Form]) -> Form:
        """The form at which the unfused path is measured: of those with the usual outputs, the most frequent."""
        live = tuple(name for name in pattern.outputs if name in pattern.returns)
        usual = Counter(form for form in forms if form.live == live)
        return usual.most_common(1)[0][0] if usual else Form(live, tuple(_scalars(pattern).items()))


def _scalars(pattern: Pattern) -> dict[str, Any]:
    return dict(example_site(pattern).attributes)


def tensors(site: Site, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Contiguous tensors of a site, made on the device: x differs between ranks, all others are the same."""
    found = {}
    for index, (name, meta) in enumerate(site.inputs.items()):
        shape = tuple(map(int, meta.shape))
        generator = torch.Generator(device).manual_seed(index * 1024 + (rank + 1 if name == "x" else 0))
        if name in SCALES:
            found[name] = torch.full(shape, 448.0 if name == "global_scale" else AMAX / 448.0, device=device)
        elif not meta.dtype.is_floating_point:
            found[name] = torch.zeros(shape, dtype=meta.dtype, device=device)
        else:
            numbers = torch.randn(shape, generator=generator, device=device)
            if name in VECTORS:
                numbers = vector(site, name, numbers)
            found[name] = numbers.to(meta.dtype)
    return found
