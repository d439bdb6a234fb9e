"""All_reduces stay in the order in which the model calls them: a rank whose graph breaks in between runs them so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_core.lifting.collectives import TARGETS
from tests.corpus.case import N, norm, reduce
from tests.support.graphs import REFERENCE, fuse, registry
from tests.test_emission import KERNEL, acme

pytestmark = pytest.mark.usefixtures("one_rank")


def first_with_the_other_as_residual(a: Tensor, b: Tensor, w: Tensor) -> Any:
    first, second = reduce(a), reduce(b)
    h = first + second.abs()  # the norm's chain begins at the first one, and its residual comes of the second
    return norm(h, w), h, second


def given() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return *(torch.randn(3, N, generator=generator) for _ in range(2)), torch.randn(N, generator=generator)


@pytest.mark.parametrize("kernel", [False, True], ids=["the definition", "a kernel"])
def test_no_all_reduce_moves_behind_a_later_one(monkeypatch: Any, kernel: bool) -> None:
    using = [acme(monkeypatch, KERNEL), REFERENCE] if kernel else [REFERENCE]
    fused = fuse(first_with_the_other_as_residual, *given(), using=registry(*using))
    placed = [node for node in fused.graphs[0].nodes if node.target in TARGETS]
    assert [node.args[0].name for node in placed] == ["mul", "mul_1"]
    refusals = [str(reason) for d in fused.sites[0].decisions for reason in d.reasons if reason.code == "order"]
    assert len(refusals) == 1 + kernel
    assert all("all_reduce would come after all_reduce_1, which the model calls later" in each for each in refusals)
    torch.testing.assert_close(fused.results, first_with_the_other_as_residual(*given()))
