"""How the all_reduce itself is written."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from tests.corpus.case import ADD, AFTER, BARE, BOTH, NORMED, PLAIN, REDUCED, Case, norm, reduce

c10d = torch.ops._c10d_functional


def in_place(x: Tensor, r: Tensor, w: Tensor) -> Any:
    reduced = x * 2
    dist.all_reduce(reduced)
    return norm(total := r + reduced, w), total


def in_place_by_name(x: Tensor, r: Tensor, w: Tensor) -> Any:
    reduced = x * 2
    dist.all_reduce(reduced, dist.ReduceOp.SUM, group=dist.group.WORLD)
    return norm(r + reduced, w)


def in_place_of_a_projection(x: Tensor, r: Tensor, w: Tensor) -> Any:
    partial = torch.nn.functional.linear(x, w.outer(w))
    dist.all_reduce(partial)
    return norm(total := r + partial, w), total


def waited_for_later(x: Tensor, r: Tensor, w: Tensor) -> Any:
    """Other work runs while the ranks talk."""
    pending = c10d.all_reduce(x * 2, "sum", dist.group.WORLD.group_name)
    gate = torch.sigmoid(r @ w.outer(w))
    reduced = c10d.wait_tensor(pending)
    return norm(total := r + reduced, w), total, gate


def lazily_waited_for(x: Tensor, r: Tensor, w: Tensor) -> Any:
    pending = funcol.all_reduce(x * 2, "sum", dist.group.WORLD)
    gate = r.sigmoid()
    return norm(total := r + pending, w) * gate, total


def by_ranks(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return norm(r + funcol.all_reduce(x * 2, "sum", [0]), w)


SECOND: dict[str, str] = {}
"""The name of another group of the same ranks, once `make_second_group` has made it."""


def make_second_group() -> None:
    """Beside the default group, in the process that compiles the rows."""
    SECOND["name"] = dist.new_group([0]).group_name


def in_second(x: Tensor) -> Tensor:
    return funcol.all_reduce(x * 1, "sum", SECOND["name"])


def two_groups(x: Tensor, r: Tensor, w: Tensor) -> Any:
    first = r + reduce(x)
    middle = norm(first, w)
    last = first + in_second(torch.tanh(middle))
    return norm(last, w), last


def two_layers(x: Tensor, r: Tensor, w: Tensor) -> Any:
    first = r + reduce(x)
    last = first + reduce(torch.tanh(norm(first, w)))
    return norm(last, w), last


CASES = [
    Case("functional", lambda x, r, w: norm(r + reduce(x), w), ADD, NORMED, AFTER),
    Case("functional, waited for twice", lambda x, r, w: norm(r + funcol.wait_tensor(reduce(x)), w), ADD, NORMED, AFTER),
    Case("functional, of a group by its name", lambda x, r, w: norm(r + funcol.all_reduce(x * 2, "sum", dist.group.WORLD.group_name), w), ADD, NORMED, AFTER),
    Case("functional, of an input itself", lambda x, r, w: norm(r + funcol.all_reduce(x, "sum", dist.group.WORLD), w), ADD, NORMED, AFTER),
    Case("functional, of the sum in capitals", lambda x, r, w: norm(r + funcol.all_reduce(x * 2, "SUM", dist.group.WORLD), w), ADD, NORMED, AFTER),
    Case("wait at a distance", waited_for_later, ADD, BOTH, AFTER),
    Case("wait by the first use", lazily_waited_for, ADD, BOTH, AFTER),
    Case("dist.all_reduce", in_place, ADD, BOTH, AFTER),
    Case("dist.all_reduce with its arguments", in_place_by_name, ADD, NORMED, AFTER),
    Case("dist.all_reduce of a projection", in_place_of_a_projection, ADD, BOTH, AFTER),
    Case("another group", lambda x, r, w: norm(in_second(x), w), PLAIN, NORMED, AFTER),
    Case("residual from another group", lambda x, r, w: norm(reduce(x) + in_second(r), w), ADD, NORMED, AFTER, others=((BARE,), ())),
    Case("two groups, the second", two_groups, ADD, BOTH, AFTER, others=((ADD,), ())),
    Case("two layers", two_layers, ADD, BOTH, AFTER, others=((ADD,), ())),
    Case("no norm behind it", lambda x, r, w: reduce(x) * 2, BARE, REDUCED),
]  # fmt: skip
