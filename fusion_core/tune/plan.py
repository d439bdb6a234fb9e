"""What there is to measure: which patterns, which ways to run each, at which kind of place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusion_core.dispatch.path import BARE, Path, Place, Rest
from fusion_core.errors import FusionError
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.requirements import Attribute
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.samples.sites import SCALES, VECTORS, example_site, resized, with_outputs
from fusion_core.samples.tensors import AMAX
from fusion_core.site import Device, Site
from fusion_core.tables.schema import UNFUSED

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
"""Patterns that come before others, the most frequent in models first."""
ALWAYS = 4
"""So many of them are measured wherever there is anything to measure; others where a strategy is made for them."""


@dataclass(frozen=True)
class Form:
    """What a place has beside its tensors: the live outputs, in the pattern's order, and the scalars by name."""

    live: tuple[str, ...]
    scalars: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Column:
    """One way to run a pattern, and the form of place at which it is measured; no strategy is the unfused path."""

    strategy: Strategy | None
    form: Form

    @property
    def name(self) -> str:
        """Its name in the table."""
        return UNFUSED if self.strategy is None else self.strategy.name


class Plan:
    """The paths of every pattern for one process group, device and dtype.

    Args:
        registry: Says which strategies there are; those that an option switches off are left out.
        dtype: Of x.
        device: Of this rank.
        group: The process group's name.
        world_size: Its number of ranks.
    """

    def __init__(
        self, registry: Registry, dtype: torch.dtype, device: torch.device, group: str, world_size: int
    ) -> None:
        self.registry = registry
        self.dtype = dtype
        self.device = device
        self._facts = Device.of(device)
        self._group = group
        self._world_size = world_size
        self._rests: dict[tuple[str, Form], Rest] = {}

    def patterns(self, hidden: Iterable[int], tokens: int) -> tuple[Pattern, ...]:
        """The patterns that are worth measuring at one of these hidden sizes, the most frequent in models first."""
        sizes = list(hidden)
        own = [
            pattern
            for pattern in self.registry.patterns.values()
            if any(self._can(strategy, pattern, size, tokens) for strategy in self._own(pattern) for size in sizes)
        ]
        always = [self.registry.patterns[name] for name in IMPORTANT[:ALWAYS]]
        return tuple(self.sorted({*own, *always} if own else ()))

    def sorted(self, patterns: Iterable[Pattern]) -> list[Pattern]:
        """Patterns in the order in which they are measured."""
        last = len(IMPORTANT)
        places = {name: place for place, name in enumerate(IMPORTANT)}
        return sorted(patterns, key=lambda p: (places.get(p.name, last), len(p.steps), p.name))

    def columns(self, pattern: Pattern) -> tuple[Column, ...]:
        """Every way to run a pattern on this device, the unfused one first; some may refuse some sizes."""
        own = [(strategy, self._form(strategy, pattern)) for strategy in self._own(pattern)]
        main = self._main(pattern, [form for _, form in own])
        bare = [] if pattern.name == BARE else [(strategy, main) for strategy in self._strategies(BARE)]
        return (Column(None, main), *(Column(strategy, form) for strategy, form in (*own, *bare)))

    def site(self, pattern: Pattern, form: Form, hidden: int, tokens: int) -> Site:
        """The facts of a place.

        Raises:
            Impossible: where the definition takes no such size.
            PatternError: where the pattern has parameters that nobody can make up.
        """
        site = example_site(pattern, device=self._facts, world_size=self._world_size)
        floats = ("x", *pattern.elementwise, *VECTORS)
        inputs = {
            name: replace(meta, dtype=self.dtype) if name in floats else meta for name, meta in site.inputs.items()
        }
        site = replace(site, inputs=inputs, attributes=dict(form.scalars), group=self._group)
        return with_outputs(pattern, resized(pattern, site, (tokens, hidden)), form.live)

    def refusals(self, column: Column, pattern: Pattern, site: Site) -> tuple[Reason, ...]:
        """Why a path cannot run a place; nobody asks whether it should."""
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

    def path(self, column: Column, pattern: Pattern, site: Site) -> Path:
        """The path itself; those of one form of place share what follows the all_reduce."""
        rest = self.rest(pattern, column.form, site)
        settings = {} if column.strategy is None else self._settings(column.strategy, pattern)
        return Path(rest.place, column.strategy, settings, rest)

    def rest(self, pattern: Pattern, form: Form, site: Site) -> Rest:
        """What follows the all_reduce at places of this form, one object for all sizes: it is compiled once."""
        key = pattern.name, form
        if key not in self._rests:
            names = tuple(name for name in pattern.tensors if name in site.inputs and name != "x")
            self._rests[key] = Rest(Place(pattern, form.live, names, dict(form.scalars), self._group))
        return self._rests[key]

    def _settings(self, strategy: Strategy, pattern: Pattern) -> dict[str, Any]:
        own = self.registry.patterns[strategy.pattern] if strategy.pattern != pattern.name else pattern
        return strategy.settings(own, self.registry.config)

    def _strategies(self, pattern: str) -> list[Strategy]:
        """Those that may be used here, but the pattern's definition: that is the unfused path by another name."""
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
        """The place that a strategy is made for: all its outputs are live, scalars have values that it takes."""
        live = pattern.returns if strategy.outputs is None else strategy.outputs
        scalars = _scalars(pattern)
        for each in (*strategy.implied(pattern), *strategy.requires):
            if isinstance(each, Attribute) and each.name in scalars and scalars[each.name] not in each.values:
                scalars[each.name] = each.values[0]
        return Form(tuple(name for name in pattern.outputs if name in live), tuple(scalars.items()))

    def _main(self, pattern: Pattern, forms: Iterable[Form]) -> Form:
        """The form at which the unfused path is measured: with the usual outputs, and the most frequent of those."""
        live = tuple(name for name in pattern.outputs if name in pattern.returns)
        usual = Counter(form for form in forms if form.live == live)
        return usual.most_common(1)[0][0] if usual else Form(live, tuple(_scalars(pattern).items()))


def _scalars(pattern: Pattern) -> dict[str, Any]:
    return dict(example_site(pattern).attributes)


def tensors(site: Site, rank: int, device: torch.device) -> dict[str, Tensor]:
    """Contiguous tensors of a place, made on the device: x is each rank's own, everything else is equal on all."""
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
                numbers = numbers * 0.5 + 1.0 - float(site.attributes.get("weight_bias", 0.0))
            found[name] = numbers.to(meta.dtype)
    return found
