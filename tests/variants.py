"""A strategy with variants, whose kernel and requirements note what they are asked and run with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fusion_core import (
    FusionConfig,
    MultipleOf,
    Reason,
    Registry,
    Site,
    Strategy,
    TensorMeta,
    Tokens,
    Variant,
    WorldSize,
)
from fusion_core.patterns import CORE_PATTERNS
from tests.support.graphs import plugin, registry

BACKENDS = ("aiter", "flashinfer", "reference")
PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
NORM = PATTERNS["all_reduce_rms_norm"]
ran: list[tuple[bool, int]] = []
asked: Counter[str] = Counter()


def total(x: Tensor, *, group: str, max_tokens: int | None = None, two_shot: bool = False, lanes: int = 1) -> Tensor:
    return _sum(x, group, two_shot, lanes)


@torch.library.custom_op("fusion_core_tests::variants_sum", mutates_args=())
def _sum(x: Tensor, group: str, two_shot: bool, lanes: int) -> Tensor:
    ran.append((two_shot, lanes))
    return funcol.all_reduce(x, "sum", group).clone()


@_sum.register_fake
def _(x: Tensor, group: str, two_shot: bool, lanes: int) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class Counted:
    """Notes that it is asked; one that names a token count depends on the number of tokens."""

    name: str
    most: int | None = None

    def unmet(self, site: Site) -> Reason | None:
        asked[f"{self.name} at {site.tokens}"] += 1
        found = site.tokens
        if self.most is None or found is None or found <= self.most:
            return None
        return Reason("counted", f"{found} tokens", f"at most {self.most}")

    def changes_at(self, site: Site) -> tuple[int, ...]:
        return () if self.most is None else (self.most + 1,)


SUMS = Strategy(
    "all_reduce",
    "acme.sum",
    total,
    (MultipleOf("x", -1, 8),),
    arguments={"lanes": 4},
    untested="no Acme 2 was at hand",
    variants=(
        Variant("", requires=(Tokens(most=8),)),
        Variant("two_shot", {"two_shot": True}, (WorldSize(1, 2),), rank=-1, untested="no switch was at hand"),
        Variant("lanes", {"lanes": 8}, rank=-2, option="lanes", batch_invariant=True),
    ),
)


def acme(monkeypatch: Any, *strategies: Strategy, **config: Any) -> Registry:
    point = plugin(monkeypatch, "acme", fusion_strategies=lambda: strategies)
    return registry(point, config=FusionConfig(**config))


def site(*shape: int) -> Site:
    x = TensorMeta(shape, torch.bfloat16)
    return Site("all_reduce", "all_reduce", {"x": x}, {"reduced": x})


def expanded(backend: str | None = None) -> dict[str, Strategy]:
    loaded = Registry.load(FusionConfig(order=BACKENDS)).backends
    return {each.name: each for name in ((backend,) if backend else BACKENDS) for each in loaded[name].strategies}
