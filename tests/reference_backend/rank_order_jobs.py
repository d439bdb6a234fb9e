"""What the workers of `test_rank_order` run. Nothing stands in for anything here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core import FusionPass, last_report
from fusion_core.patterns.plain import all_reduce
from fusion_core.testing import subjects
from fusion_reference.rank_order import DTYPES, all_reduce_in_rank_order
from tests.reference_backend.one_call import given, world


def errors(shape: tuple[int, ...]) -> list[tuple[str, float, float]]:
    """For each dtype, how far this sum and the group's own are from float64."""
    found = []
    for dtype in DTYPES:
        x = given(shape, torch.float64, dist.get_rank()).to(dtype)
        parts = [torch.empty(shape, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.double())
        exact = torch.stack(parts).sum(0)
        own = all_reduce_in_rank_order(x, group=world())
        assert (own.shape, own.dtype) == (x.shape, dtype)
        gloo = all_reduce.function(x, group=world())
        found.append((str(dtype), *(float((each.double() - exact).abs().max()) for each in (own, gloo))))
    return found


def rounded_once() -> tuple[list[float], list[float]]:
    """A sum that a half-precision accumulator loses: 256 + 1 + 1, 1 and 1 on the last two ranks; and in rank order."""
    rank, size = dist.get_rank(), dist.get_world_size()
    small = torch.full((1, 2), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    large = torch.full((1, 2), (2.0**24, 1.0, -(2.0**24))[rank % 3] if size > 2 else 1.0)
    return [each.flatten().tolist() for each in (all_reduce_in_rank_order(t, group=world()) for t in (small, large))]


def same_bits(batches: list[int], hidden: int, dtypes: Sequence[torch.dtype], compiled: bool = False) -> list[bool]:
    """Whether the rows of a batch have the bits that they have alone, for each size of batch and each dtype."""
    run = _compiled() if compiled else _called
    found = []
    for dtype in dtypes:
        rows = given((max(batches), hidden), torch.float64, dist.get_rank()).to(dtype)
        with torch.no_grad():
            alone = torch.cat([_called(rows[n : n + 1]) for n in range(len(rows))])
            found += [torch.equal(run(rows[:batch]), alone[:batch]) for batch in batches]
    return found


def _called(x: Tensor) -> Tensor:
    return all_reduce_in_rank_order(x, group=world())


def _compiled() -> Callable[[Tensor], Tensor]:
    """An all_reduce that the pass replaces by this one, with something for Inductor to fuse behind it."""
    name = "reference.all_reduce_in_rank_order"
    (subject,) = (each for each in subjects("reference") if each.name == name)
    options = {"post_grad_custom_post_pass": FusionPass(registry=subject.alone()), "fx_graph_cache": False}

    def model(x: Tensor) -> Tensor:
        return torch.relu(all_reduce.function(x, group=world())) - torch.relu(-all_reduce.function(x, group=world()))

    function = torch.compile(model, dynamic=True, fullgraph=True, options=options)

    def run(x: Tensor) -> Tensor:
        result = function(x)
        assert {site.strategy for site in last_report().sites} == {name}
        return result

    return run


def odd_forms() -> list[bool]:
    """Inputs of other forms: no dimension, no rows, strided; whether each gives what the group's own sum does."""
    x = torch.arange(12.0).view(3, 4) + dist.get_rank()
    found = []
    for each in (x[0, 0], x[:0], x.t(), x[:, ::2], x.view(1, 3, 2, 2)):
        own, expected = (
            all_reduce_in_rank_order(each, group=world()),
            all_reduce.function(each.contiguous(), group=world()),
        )
        found.append(own.is_contiguous() and torch.equal(own, expected))
    return found
