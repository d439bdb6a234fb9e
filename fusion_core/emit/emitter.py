"""A chosen strategy into the graph: its operators in, the nodes of the site out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fusion_core.config import FusionConfig
from fusion_core.decide.candidate import Candidate
from fusion_core.dispatch.by_tokens import guarded, is_guarded
from fusion_core.emit.inserter import Inserter
from fusion_core.emit.pairing import SITE, is_collective, is_plain, seal
from fusion_core.emit.trace import Decompositions, Unplaceable, returned, trace
from fusion_core.errors import described
from fusion_core.lift.algebra import same_shape, same_size, shape_of
from fusion_core.lift.c10d_functional import COALESCED
from fusion_core.lift.graph import LiftedGraph
from fusion_core.lift.term import held_by, nodes_of
from fusion_core.plugins.strategy import Strategy, schema_of
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta, dtype_name


@dataclass(frozen=True, eq=False)
class Plan:
    """A replacement that can be done: where, of what, by which operators.

    Attributes:
        candidate: The strategy and its site.
        place: The node behind which the strategy's operators go.
        hoisted: Late inputs that move behind ``place`` first, in order.
        inputs: The strategy's tensors by name, as they are in the graph now: a node, or several to be added first.
        reshapes: Inputs that take x's shape first → that shape.
        traced: The strategy's operators.
        views: Nodes that hold an output in another shape than the strategy's → that shape.
    """

    candidate: Candidate
    place: fx.Node
    hoisted: list[fx.Node]
    inputs: dict[str, tuple[fx.Node, ...]]
    reshapes: dict[str, list[int]]
    traced: fx.GraphModule
    views: dict[fx.Node, list[int]]


class Emitter:
    """Puts strategies into one graph. Keeps what it traced: the sites of a model's layers are mostly alike."""

    def __init__(
        self, graph: fx.Graph, view: LiftedGraph, decompositions: Decompositions, config: FusionConfig
    ) -> None:
        self.graph = graph
        self.view = view
        self.decompositions = decompositions
        self.config = config
        self._traced: dict[object, fx.GraphModule] = {}
        self._guarded: dict[object, Strategy] = {}
        self._taken: dict[fx.Node, str] = {}
        self._replaced: dict[fx.Node, fx.Node] = {}

    def plan(self, candidate: Candidate) -> Plan:
        """How a site is replaced by its strategy; changes nothing.

        Raises:
            Unplaceable: where another site has taken a part of it, where no place in the graph has all inputs before
                it and all uses behind it, or where the strategy cannot be traced or gives other shapes or dtypes.
        """
        found = candidate.match
        if taken := next((node for node in found.erased if node in self._taken), None):
            raise Unplaceable(
                Reason("taken", f"{taken.name} is a part of the site at {self._taken[taken]}", "a chain of its own")
            )
        bound = {n: v for n in found.pattern.tensors if (v := found.bound.get(n)) is not None}
        inputs = {name: tuple(map(self._now, nodes_of(value))) for name, value in bound.items()}
        (x,) = inputs["x"]
        place, hoisted = self._place(candidate, [node for nodes in inputs.values() for node in nodes])
        reshapes = {
            name: self._sizes(shape_of(x))
            for name, nodes in inputs.items()
            if name in found.pattern.elementwise and not all(same_shape(shape_of(node), shape_of(x)) for node in nodes)
        }
        fakes = {name: held.meta["val"] for name, value in bound.items() if (held := held_by(value)) is not None}
        with x.meta["val"].fake_mode:
            fakes |= {name: fakes[name].reshape(sizes) for name, sizes in reshapes.items()}
        traced = self._trace(candidate, fakes)
        results = _results(candidate, traced)
        # a function may import what registers its operators, which a process that finds the graph in a cache lacks
        needs_guard = candidate.site.world_size > 1 or schema_of(candidate.strategy.impl) is None
        if needs_guard and not is_plain(traced) and not is_guarded(traced):
            candidate = self._guard(candidate)
            traced = self._trace(candidate, fakes)
            results = _results(candidate, traced)
        views = {
            node: self._sizes(shape_of(node))
            for node, name in found.holders.items()
            if not same_shape(shape_of(node), _in_bytes(results[name], node.meta["val"].dtype).shape)
        }
        return Plan(candidate, place, hoisted, inputs, reshapes, traced, views)

    def _guard(self, candidate: Candidate) -> Candidate:
        """The same through the operator that runs a kernel only where all ranks are about to."""
        strategy, found = candidate.strategy, candidate.match
        key = (strategy.name, tuple(found.scalars.items()), tuple(found.outputs), tuple(found.bound))
        if key not in self._guarded:
            try:
                self._guarded[key] = guarded(found, ((1, strategy.name),), {strategy.name: strategy}, self.config)
            except TypeError as error:  # a scalar that a graph cannot hold as text
                raise Unplaceable(Reason("trace", str(error), "scalars that are plain values")) from error
        return replace(candidate, strategy=self._guarded[key])

    def seal(self) -> None:
        """Once every site is placed: tell the kernels among which collectives they are."""
        seal(self.graph)

    def apply(self, plan: Plan) -> None:
        """Change the graph as planned: the strategy's operators in, every node of the site out.

        Raises:
            Unplaceable: where an operator of the strategy raises when it is put in; the graph is then as it was.
        """
        found, place = plan.candidate.match, plan.place
        position = self.view.position
        before = [(node, node.prev, position[node]) for node in plan.hoisted]
        for node in plan.hoisted:
            place.append(node)
            position[node] = position[place]  # for the next site: what stands here already is not late there
            place = node
        insert = Inserter(self.graph, self.view.position, place, found.erased[-1], plan.candidate.strategy.name)
        insert.meta[SITE] = found.anchor.name
        try:
            copied = insert.copy(plan.traced, self._tensors(plan, insert))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # a plugin's fake ran once more; nothing uses its nodes yet
            insert.undo()
            for node, previous, late in before:
                previous.append(node)
                position[node] = late
            text = f"placing {plan.candidate.strategy.name} raised {described(error)}"
            raise Unplaceable(Reason("trace", text, "an impl that runs on fake tensors each time")) from error
        outputs = dict(zip(found.outputs, copied, strict=True))
        for old, name in found.holders.items():
            new = outputs[name]
            if (dtype := old.meta["val"].dtype) != new.meta["val"].dtype:
                new = insert(torch.ops.aten.view.dtype, (new, dtype))
            if old in plan.views:
                new = insert(torch.ops.aten.reshape.default, (new, plan.views[old]))
            old.replace_all_uses_with(new)
            self._replaced[old] = new
        self._taken |= dict.fromkeys(found.erased, found.anchor.name)
        left = {n for node in found.erased for n in node.all_input_nodes} - set(found.erased)
        for node in reversed(found.erased):
            self.graph.erase_node(node)
        coalesced = {node for node in left if node.target in COALESCED}
        for node in coalesced:
            self._drop_parts(node)
        self._sweep(left - coalesced)

    @staticmethod
    def _tensors(plan: Plan, insert: Inserter) -> list[fx.Node]:
        """The strategy's tensors, as nodes of the form that it takes."""
        tensors = []
        for name, nodes in plan.inputs.items():
            if name in plan.reshapes:
                nodes = tuple(insert(torch.ops.aten.reshape.default, (node, plan.reshapes[name])) for node in nodes)
            tensors.append(nodes[0] if len(nodes) == 1 else insert(torch.ops.aten.add.Tensor, nodes))
        return tensors

    def _drop_parts(self, node: fx.Node) -> None:
        """Take out of a coalesced collective what nothing uses any more."""
        inputs, values = node.args[0], node.meta["val"]
        assert isinstance(inputs, list | tuple)
        used: dict[Any, fx.Node] = {part.args[1]: part for part in node.users}
        kept = sorted(used)
        if not kept:
            self.graph.erase_node(node)
            return
        node.update_arg(0, [inputs[index] for index in kept])
        node.meta["val"] = [values[index] for index in kept]
        for place, index in enumerate(kept):
            used[index].update_arg(1, place)

    def _sweep(self, nodes: Iterable[fx.Node]) -> None:
        """Erase what only the site used: buffers that it wrote into, casts of its weight."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node.op != "call_function" or node.users or node.is_impure() or node not in self.view.position:
                continue
            waiting += node.all_input_nodes
            self.graph.erase_node(node)
            del self.view.position[node]

    def _now(self, node: fx.Node) -> fx.Node:
        """The node that holds a value after the replacements so far."""
        return self._replaced.get(node, node)

    def _place(self, candidate: Candidate, inputs: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
        """The node after which to insert, and inputs that must be moved behind it first.

        As late as the last input where every use and the next collective come later still; else before these, with the
        late inputs moved up, which is safe for what has no side effects and does not hang on the site. No collective
        may pass another: ranks pair them in the model's order, in which one whose graph breaks in between runs them.
        """
        position, body, anchor = self.view.position, set(candidate.match.erased), candidate.match.anchor
        uses = [user for node in candidate.match.holders for user in node.users if user not in body]
        first = min(uses, key=position.__getitem__, default=None)
        following = _next_collective(anchor)
        limit = min((position[node] for node in (first, following) if node is not None), default=len(position))
        late: list[fx.Node] = []
        stack = [node for node in inputs if position[node] >= limit]
        while stack:
            node = stack.pop()
            if node in late:
                continue
            if not self._may_move(node, anchor):
                if first is not None and position[first] == limit:
                    found, needs = f"comes after {first}, which uses its result", "all inputs before the first use"
                    raise Unplaceable(Reason("order", f"{node.name}, which the site needs, {found}", needs))
                found = f"{anchor.name} would come after {following}, which the model calls later"
                raise Unplaceable(Reason("order", found, "all inputs before the next collective"))
            late.append(node)
            stack.extend(n for n in node.all_input_nodes if position[n] > position[anchor])
        place = max([anchor, *(node for node in inputs if node not in late)], key=position.__getitem__)
        return place, sorted(late, key=position.__getitem__)

    def _may_move(self, node: fx.Node, anchor: fx.Node) -> bool:
        """Whether an operator may run as early as right behind an all_reduce, as far as it alone is concerned."""
        if node.op != "call_function" or node.is_impure() or _writes(node) or is_collective(node):
            return False
        position = self.view.position
        writes = (position[user] for read in node.all_input_nodes for user in self.view.writers(read))
        return not any(position[anchor] < write < position[node] for write in writes)

    def _sizes(self, shape: tuple[Any, ...]) -> list[int]:
        """A shape as arguments of reshape. One size may be known only at run time: it follows from the others."""
        symbolic = [size for size in shape if not isinstance(size, int)]
        if len(symbolic) > 1:
            found = f"the shape [{', '.join(map(str, shape))}] has {len(symbolic)} symbolic sizes"
            raise Unplaceable(Reason("reshape", found, "at most one where a site changes shape"))
        if symbolic and any(same_size(size, 0) for size in shape):  # beside a 0, reshape cannot tell a size left out
            found = f"the shape [{', '.join(map(str, shape))}] has a symbolic size beside a 0"
            raise Unplaceable(Reason("reshape", found, "no empty tensor where a site changes shape"))
        return [size if isinstance(size, int) else -1 for size in shape]

    def _trace(self, candidate: Candidate, fakes: dict[str, torch.Tensor]) -> fx.GraphModule:
        """The strategy as a graph of operators, traced once for sites that are alike."""
        strategy, found = candidate.strategy, candidate.match
        metas = tuple((name, str(TensorMeta.of(fake)), str(fake.stride()), fake.device) for name, fake in fakes.items())
        key = (strategy.name, id(strategy.impl), metas, tuple(found.scalars.items()), tuple(found.outputs))
        if key not in self._traced:
            self._traced[key] = trace(strategy, found, fakes, self.decompositions, self.config)
        return self._traced[key]


def _next_collective(anchor: fx.Node) -> fx.Node | None:
    """The first collective behind a node."""
    node = anchor.next
    while node.op != "root" and not is_collective(node):
        node = node.next
    return None if node.op == "root" else node


def _writes(node: fx.Node) -> bool:
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)


def _results(candidate: Candidate, traced: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The traced outputs by name, checked against what the site had."""
    outputs = candidate.match.outputs
    results = {name: node.meta["val"] for name, node in zip(outputs, returned(traced), strict=True)}
    for name, value in results.items():
        wanted = outputs[name].meta["val"]
        value = _in_bytes(value, wanted.dtype)
        if value.dtype != wanted.dtype or not same_size(value.numel(), wanted.numel()) or value.device != wanted.device:
            found = f"{candidate.strategy.name} gives {name} as {TensorMeta.of(value)} on {value.device}"
            raise Unplaceable(
                Reason("output", found, f"{dtype_name(wanted.dtype)} of {tuple(wanted.shape)} on {wanted.device}", name)
            )
    return results


def _in_bytes(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One-byte values as the integers in which a site holds their bytes: four E4M3 scales to an int32, for one."""
    holds_bytes = value.dtype.itemsize == 1 and dtype in (torch.uint8, torch.int32) and value.dtype != dtype
    return value.view(dtype) if holds_bytes and same_size(value.shape[-1] % dtype.itemsize, 0) else value
