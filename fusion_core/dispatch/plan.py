"""What runs at a site from which token count on, as data: a graph has it as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fusion_core._json.values import decode_scalar, encode_scalar
from fusion_core.dispatch import named
from fusion_core.dispatch.bound_pattern import BoundPattern
from fusion_core.patterns.definition import GROUP


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
        return BoundPattern(named.pattern_of(self.pattern), self.live, self.names, scalars, self.scalars[GROUP])

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
