"""The strides that a site's results must have, whatever computed them: the kernels that follow rely on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_core._torch.tensors import FakeTensorMode
from fusion_core.dispatch.bound_pattern import BoundPattern


class Strides:
    """The strides of a site's results, by the definition, cached per shape of x."""

    def __init__(self, place: BoundPattern) -> None:
        self.place = place
        self._known: dict[Any, tuple[tuple[int, ...], ...]] = {}

    def settled(self, x: Tensor, others: Sequence[Tensor], results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The results with these strides; those with others are copied."""
        if "scale" not in self.place.live and all(result.is_contiguous() for result in results):
            return results
        if x.shape not in self._known:
            self._known[x.shape] = tuple(fake.stride() for fake in _fakes(self.place, x, others))
        return tuple(
            result if result.stride() == strides else _restrided(result, strides)
            for result, strides in zip(results, self._known[x.shape], strict=True)
        )


def fake_results(place: BoundPattern, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The definition's results on fake tensors: contiguous, except scales, whose layout is part of the pattern."""
    results = place.definition(x.contiguous(), *(other.contiguous() for other in others))
    return tuple(
        result if name == "scale" else result.contiguous() for name, result in zip(place.live, results, strict=True)
    )


def _fakes(place: BoundPattern, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The definition's results for tensors of these forms, without data."""
    with FakeTensorMode() as mode:
        return fake_results(place, mode.from_tensor(x), [mode.from_tensor(other) for other in others])


def _restrided(result: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)
