"""The post-grad graph of a model of many equal layers, without the minutes that Dynamo would take to capture it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusion_core import _inductor


class _Keep(_inductor.CustomGraphPass):
    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, graph: fx.Graph) -> None:
        copied = fx.Graph()
        copied.output(copied.graph_copy(graph, {}))
        self.graphs.append(copied)

    def uuid(self) -> None:
        return None

    def __deepcopy__(self, memo: Any) -> _Keep:
        return self


def stacked(layer: Callable[..., tuple[torch.Tensor, ...]], given: tuple[torch.Tensor, ...], layers: int) -> fx.Graph:
    """One layer's graph as Inductor's passes see it, as often as it is asked, each copy behind the one before.

    Args:
        layer: From tensors to as many of the first of them as it gives back: the next layer's.
        given: Its tensors.
        layers: How often.
    """
    keep = _Keep()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, backend=_inductor.post_grad_only(keep), fullgraph=True)(*given)
    (one,) = keep.graphs
    found = fx.Graph()
    inputs = [node for node in one.nodes if node.op == "placeholder"]
    values: list[Any] = []
    for node in inputs:
        made = found.placeholder(node.name)
        made.meta = dict(node.meta)
        values.append(made)
    for _ in range(layers):
        returned = found.graph_copy(one, dict(zip(inputs, values, strict=True)))
        assert isinstance(returned, tuple | list)
        values[: len(returned)] = returned
    found.output(tuple(values[: len(returned)]))
    return found
