"""What the workers of `test_common_ground` do about groups: which ones a graph shows, and which have other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fusion_core.agree import ranks as common_ground
from fusion_core.agree.graph_groups import mentioned
from fusion_core.agree.ranks import agree
from tests.common_ground_jobs import StopHere, stop
from tests.odd_registries import of


def shown() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Groups that Dynamo's graph of each spelling shows, and those that it should."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    tp: DeviceMesh = mesh["tp"]
    group = tp.get_group()
    x = torch.ones(4, 4)
    weight = distribute_tensor(torch.ones(4, 4), tp, [Shard(0)])

    def functional(x: Tensor) -> Tensor:
        return funcol.all_reduce(x, "sum", group)

    def in_place(x: Tensor) -> Tensor:
        x = x * 1
        dist.all_reduce(x, group=group)
        return x

    def from_local(x: Tensor) -> Tensor:
        return DTensor.from_local(x, tp, [Partial()]).redistribute(tp, [Replicate()]).to_local()

    def with_weight(x: Tensor) -> Tensor:
        summed = torch.nn.functional.linear(DTensor.from_local(x, tp, [Replicate()]), weight)
        return summed.redistribute(placements=[Replicate()]).to_local()

    def of_dtensors(x: Tensor) -> Tensor:
        return (x @ x).redistribute(placements=[Replicate()]).to_local()  # type: ignore[attr-defined]

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(functional, x, use_reentrant=False)

    def local(x: Tensor) -> Tensor:
        return x.sum(-1)

    forms = (functional, in_place, from_local, with_weight, of_dtensors, checkpointed, local)
    found = {}
    for form in forms:
        names: list[tuple[str, ...]] = []

        def backend(graph_module: Any, inputs: Sequence[Any], names: list[Any] = names) -> Any:
            names.append(mentioned(graph_module, inputs))
            return stop

        torch._dynamo.reset()
        with suppress(StopHere):
            given = weight if form is of_dtensors else x.clone().requires_grad_(form is checkpointed)
            torch.compile(form, backend=backend, fullgraph=True)(given)
        found[form.__name__] = (names[0], () if form is local else (str(group.group_name),))
    return found


def pretended() -> tuple[bool, bool]:
    """Whether a group of torch's fake backend, and one of a single rank, agree with themselves at once."""
    fake = dist.new_group(backend="fake")
    single = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with mock.patch.object(common_ground, "group_store", side_effect=AssertionError):
        registry = of()
        return tuple(not agree([each.group_name], registry).differences_of for each in (fake, single))  # type: ignore[return-value]
