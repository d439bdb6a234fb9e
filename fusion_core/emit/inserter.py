"""Inserts nodes into a graph in sequence, with the metadata that later passes read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion_core._torch.operators import OpOverload, schema_of
from fusion_core._torch.tensors import FakeTensor, with_own_memory
from fusion_core.emit.pairing import PROVENANCE
from fusion_core.emit.trace import returned


def _allocates(target: Any) -> bool:
    """Whether an operator allocates its result: later passes compare memory to find what they may reuse."""
    if target in _COLLECTIVES:
        return True
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    returns = schema_of(target).returns
    return len(returns) == 1 and returns[0].alias_info is None and target not in _MAY_ALIAS


_COLLECTIVES = (torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default)
_MAY_ALIAS = (torch.ops.aten.reshape.default, torch.ops.aten._to_copy.default, torch.ops.aten.contiguous.default)


class Inserter:
    """Inserts nodes into a graph in sequence, with the metadata that later passes read."""

    def __init__(
        self, graph: fx.Graph, position: dict[fx.Node, int], place: fx.Node, source: fx.Node, strategy: str
    ) -> None:
        self.graph = graph
        self.position = position
        self.place = place
        self._made: list[fx.Node] = []
        self.fake_mode = source.meta["val"].fake_mode
        inherited = ("stack_trace", "nn_module_stack", "source_fn_stack", "original_aten", "seq_nr")
        self.meta = {key: source.meta[key] for key in inherited if key in source.meta} | {PROVENANCE: strategy}

    def __call__(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, like: Any = None
    ) -> fx.Node:
        """Insert one operator. ``like`` is its fake result if that is known from an equal site."""
        kwargs = kwargs or {}
        with self.graph.inserting_after(self.place):
            node = self.graph.call_function(target, args, kwargs)
        self._made.append(node)
        if isinstance(like, FakeTensor) and _allocates(target):
            value = with_own_memory(like)
        else:
            values, keywords = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.fake_mode:
                value = target(*values, **keywords)
        node.meta |= {**self.meta, "val": value}
        # the position of the node before it: enough for comparison with nodes of the original graph
        self.position[node] = self.position[self.place]
        self.place = node
        return node

    def copy(self, traced: fx.GraphModule, inputs: list[fx.Node]) -> list[fx.Node]:
        """Insert a traced strategy, node for node, with the graph's own inputs. Returns its results."""
        copied: dict[fx.Node, fx.Node] = {}
        remaining = iter(inputs)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copied[node] = next(remaining)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), copied.__getitem__)
                copied[node] = self(node.target, args, kwargs, node.meta.get("val"))
        return [copied[node] for node in returned(traced)]

    def undo(self) -> None:
        """Remove the inserted nodes from the graph; nothing else may use them yet."""
        while self._made:
            node = self._made.pop()
            self.graph.erase_node(node)
            self.position.pop(node, None)
