"""The process groups that a graph of Dynamo mentions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from fusion_core._torch.tensors import FakeTensor, is_traceable_wrapper_subclass
from fusion_core.groups import world_size
from fusion_core.lift.dialects.vllm_groups import torch_groups

_PLAIN = frozenset((type(None), bool, int, float, torch.dtype, fx.Node, torch.Tensor, torch.nn.Parameter, FakeTensor))
"""Types of most values in a graph, none of which names a group."""


def mentioned(graph_module: fx.GraphModule, inputs: Iterable[Any]) -> tuple[str, ...]:
    """Names of the groups that a Dynamo graph can communicate in, as far as the graph shows them.

    A graph refers to a group by name, as functional collectives do, or through a ProcessGroup, a DeviceMesh or a
    DTensor. These may be inputs, constants or values of nodes, in nested graphs too.
    """
    if not dist.is_available() or not dist.is_initialized():
        return ()
    seen: set[Any] = set()
    found: dict[str, None] = {}
    for value in _values(graph_module, inputs):
        if type(value) in _PLAIN:
            continue
        for source in _sources(value):
            key = source if isinstance(source, str) else id(source)
            if key not in seen:
                seen.add(key)
                found |= dict.fromkeys(_names(source))
    return tuple(sorted(found))


def _values(graph_module: fx.GraphModule, inputs: Iterable[Any]) -> Iterator[Any]:
    yield from inputs
    yield from graph_module.parameters()
    yield from graph_module.buffers()
    for module in graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            constants: list[Any] = []
            fx.node.map_aggregate((node.args, node.kwargs), constants.append)
            yield from constants
            yield node.meta.get("example_value")
            if node.op == "get_attr":
                yield getattr(module, str(node.target), None)
            for cell in getattr(node.target, "__closure__", None) or ():
                yield cell.cell_contents


def _sources(value: Any) -> Iterator[Any]:
    """The parts of a value that can name groups."""
    value = getattr(value, "real_obj", value)  # Dynamo puts a fake in place of an opaque object
    if isinstance(value, str | dist.ProcessGroup | DeviceMesh):
        yield value
    elif isinstance(value, torch.Tensor):
        if (mesh := getattr(value, "device_mesh", None)) is not None:
            yield from _sources(mesh)
        elif is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _sources(getattr(value, name))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _sources(each)


def _names(source: Any) -> Iterator[str]:
    if isinstance(source, DeviceMesh):
        yield from (str(group.group_name) for group in source.get_all_groups())
    elif isinstance(source, dist.ProcessGroup):
        yield str(source.group_name)
    elif (name := torch_groups().get(source, source)) and world_size(name) is not None:
        yield name
