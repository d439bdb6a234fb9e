"""What the ranks send for norms of split vectors: one all_reduce of a few numbers a token.

These patterns are never looked for. A graph runs one of them in place of the collective of a pattern of
`fusion_core.patterns.sharded`: what comes before and after it is computed on each rank alone, where Inductor makes one
kernel of it and its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fusion_core.patterns.definition import Pattern, pattern
from fusion_core.vocabulary.operation import operation
from fusion_core.vocabulary.sharded import mean_square_over_ranks, mean_squares_over_ranks


def _own(x: torch.Tensor, **parts: torch.Tensor) -> torch.Tensor:
    return x.clone()


@operation(results=("means",), alone=_own, by_rank=True)
def _of_one(x: torch.Tensor, part: torch.Tensor, group: str) -> torch.Tensor:
    mean: torch.Tensor = mean_square_over_ranks.function(part, group)
    return mean.to(x.dtype)


@operation(results=("means",), alone=_own, by_rank=True)
def _of_two(x: torch.Tensor, part: torch.Tensor, y_part: torch.Tensor, group: str) -> torch.Tensor:
    return torch.cat(mean_squares_over_ranks.function(part, y_part, group), -1).to(x.dtype)


@pattern(outputs=("means",))
def means_of_squares(x: torch.Tensor, part: torch.Tensor, *, group: str) -> torch.Tensor:
    """The sum of ``x`` over the ranks, which is the mean of squares of whole vectors.

    Args:
        x: ``[..., 1]``, the mean of squares of ``part`` divided by the number of ranks. It may be overwritten.
        part: ``[..., n]``, the rank's part. Where ranks run different graphs it is gathered, as models do.
        group: The process group.
    """
    means: torch.Tensor = _of_one(x, part, group)
    return means


@pattern(outputs=("means",))
def means_of_squares_of_two(x: torch.Tensor, part: torch.Tensor, y_part: torch.Tensor, *, group: str) -> torch.Tensor:
    """`means_of_squares` of two vectors a token: ``x`` and the result are ``[..., 2]``."""
    means: torch.Tensor = _of_two(x, part, y_part, group)
    return means


MEANS: Mapping[str, Pattern] = {
    mean_square_over_ranks.name: means_of_squares,
    mean_squares_over_ranks.name: means_of_squares_of_two,
}
"""The first word of a pattern → what the ranks send for it."""
