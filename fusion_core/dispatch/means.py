"""Strategies that reduce means only: each rank's own means come before them, and the rest of the pattern behind them.

Both are plain torch on each rank alone. In a graph only the all_reduce between them is inside an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_core._torch.distributed import size_of
from fusion_core.dispatch.bound_pattern import BoundPattern
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.patterns.means import MEANS
from fusion_core.plugins.strategy import Strategy

Reduce = Callable[[Tensor, Sequence[Tensor], str], Tensor]
"""From a rank's means, the parts that they are of, and the group, to the sum of the ranks' means."""


def over_ranks(pattern: Pattern, reduce: Reduce) -> Callable[..., tuple[Tensor, ...]]:
    """A pattern whose collective is of means, as a function of its parameters and ``group``, by name, to its outputs.

    Args:
        pattern: The pattern.
        reduce: What sums the means.
    """
    step = pattern.steps[0]

    def run(x: Tensor, *, group: str, **given: Any) -> tuple[Tensor, ...]:
        given["x"] = x
        names = tuple(name for name in pattern.tensors if name != "x" and given.get(name) is not None)
        scalars = {name: value for name, value in given.items() if name in pattern.scalars}
        place = BoundPattern(pattern, pattern.outputs, names, scalars, group)
        parts = [given[operand.name] for name, operand in step.operands.items() if name != GROUP]
        assert step.operation.alone is not None
        own = step.operation.alone(*parts)
        means = torch.cat(own, -1) if isinstance(own, tuple) else own
        # divided first: the sum of the ranks' means may exceed float32 where their mean does not
        reduced = reduce((means / size_of(group)).contiguous(), parts, group)
        return place.behind(reduced.split(1, -1) if isinstance(own, tuple) else (reduced,), given)

    return run


def function_of(strategy: Strategy, pattern: Pattern) -> Callable[..., Any]:
    """A strategy as a function of its pattern's parameters: its ``impl``, unless that reduces means only."""
    if not strategy.reduces_means:
        return strategy.impl

    def reduce(means: Tensor, parts: Sequence[Tensor], group: str) -> Tensor:
        summed: Tensor = strategy.impl(means, group=group, **strategy.arguments)
        return summed

    run = over_ranks(pattern, reduce)
    return run if len(pattern.outputs) > 1 else lambda x, **given: run(x, **given)[0]


def runs_inside(strategy: Strategy, pattern: Pattern) -> bool:
    """Whether a strategy reduces means, and a pattern is what the ranks send for it."""
    return strategy.reduces_means and pattern in MEANS.values()
