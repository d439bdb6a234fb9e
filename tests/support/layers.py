"""The post-grad graph of a model of many equal layers, without the minutes that Dynamo would need to capture it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusion_core._torch import inductor


class _Keep(inductor.CustomGraphPass):
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
    """One layer's graph, as Inductor's passes get it, repeated in sequence.

    Args:
        layer: Takes tensors and returns new values for the first of them, the inputs of the next layer.
        given: Its tensors.
        layers: The number of copies.
    """
    keep = _Keep()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layer, backend=inductor.post_grad_only(keep), fullgraph=True)(*given)
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
