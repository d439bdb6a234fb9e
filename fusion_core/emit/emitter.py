"""Inserts a chosen strategy's operators into the graph and removes the nodes of the site."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fusion_core._torch.operators import schema_of
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
from fusion_core.lift.term import Addend, addends_of, held_by
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta, dtype_name

MERGE = "FusionConfig(merge=True) changes their order, where all ranks run the same graphs"


@dataclass(frozen=True, eq=False)
class Plan:
    """A replacement that is known to be possible.

    Attributes:
        candidate: The strategy and its site.
        place: The node after which the strategy's operators are inserted.
        hoisted: Late inputs that first move to after ``place``, in order.
        inputs: The strategy's tensors by name, as they are in the graph now: a node, or several to be added first.
        reshapes: Inputs that are first reshaped to x's shape → that shape.
        traced: The strategy's operators.
        views: Nodes of an output with another shape than the strategy's → that shape.
    """

    candidate: Candidate
    place: fx.Node
    hoisted: list[fx.Node]
    inputs: dict[str, tuple[Addend, ...]]
    reshapes: dict[str, list[int]]
    traced: fx.GraphModule
    views: dict[fx.Node, list[int]]


class Emitter:
    """Inserts strategies into one graph. Caches traced strategies, since most sites of a model are equal."""

    def __init__(
        self, graph: fx.Graph, view: LiftedGraph, decompositions: Decompositions, config: FusionConfig
    ) -> None:
        self.graph = graph
        self.view = view
        self.decompositions = decompositions
        self.config = config
        self._traced: dict[object, fx.GraphModule] = {}
        self._guarded: dict[object, Strategy] = {}
        self.taken: dict[fx.Node, str] = {}
        """Nodes of replaced sites → the label of the site's first collective."""
        self._replaced: dict[fx.Node, fx.Node] = {}

    def plan(self, candidate: Candidate) -> Plan:
        """The replacement of a site by its strategy; changes nothing.

        Raises:
            Unplaceable: Another site has taken a part of it, no point in the graph is after all inputs and before all
                uses, the strategy cannot be traced, or it returns other shapes or dtypes.
        """
        found = candidate.match
        if taken := next((node for node in found.removed if node in self.taken), None):
            raise Unplaceable(
                Reason("taken", f"{taken.name} is a part of the site at {self.taken[taken]}", "a chain of its own")
            )
        bound = {n: v for n in found.pattern.tensors if (v := found.bound.get(n)) is not None}
        inputs = {
            name: tuple(replace(addend, node=self._now(addend.node)) for addend in addends_of(value))
            for name, value in bound.items()
        }
        (x,) = (addend.node for addend in inputs["x"])
        place, hoisted = self._place(candidate, [addend.node for addends in inputs.values() for addend in addends])
        fakes = {name: held.meta["val"] for name, value in bound.items() if (held := held_by(value)) is not None}
        elementwise = [name for name in inputs if name in found.pattern.elementwise]
        reshapes = {
            name: self._sizes(shape_of(x))
            for name in elementwise
            if not all(addend.is_row or same_shape(shape_of(addend.node), shape_of(x)) for addend in inputs[name])
        }
        with x.meta["val"].fake_mode:
            for name in elementwise:
                if not same_shape(fakes[name].shape, shape_of(x)):
                    fakes[name] = fakes[name].reshape(self._sizes(shape_of(x)))
        if candidate.strategy.reduces_means:
            candidate = self._guard(candidate)
        traced = self._trace(candidate, fakes)
        results = _results(candidate, traced)
        # in a group of one rank too: the guard loads a function's operators in a process that finds the graph in a
        # cache, and adds its note to an error at run time
        if not is_plain(traced) and not is_guarded(traced):
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
        """The candidate, run through the operator that calls a kernel only if all ranks are about to."""
        strategy, found = candidate.strategy, candidate.match
        key = (strategy.name, tuple(found.scalars.items()), tuple(found.outputs), tuple(found.bound))
        if key not in self._guarded:
            try:
                self._guarded[key] = guarded(found, ((1, strategy.name),), {strategy.name: strategy}, self.config)
            except TypeError as error:  # a scalar that cannot be written into a graph as text
                raise Unplaceable(Reason("trace", str(error), "scalars that are plain values")) from error
        return replace(candidate, strategy=self._guarded[key])

    def seal(self) -> None:
        """Give kernels the sequence of their group's collectives; to be called once every site is replaced."""
        seal(self.graph)

    def apply(self, plan: Plan) -> None:
        """Change the graph as planned: insert the strategy's operators and remove every node of the site.

        Raises:
            Unplaceable: An operator of the strategy raises when it is inserted; the graph is then unchanged.
        """
        found, place = plan.candidate.match, plan.place
        position = self.view.position
        before = [(node, node.prev, position[node]) for node in plan.hoisted]
        for node in plan.hoisted:
            place.append(node)
            position[node] = position[place]  # so that the next site does not treat this node as late
            place = node
        insert = Inserter(self.graph, self.view.position, place, found.removed[-1], plan.candidate.strategy.name)
        insert.meta[SITE] = found.anchor.name
        try:
            copied = insert.copy(plan.traced, self._tensors(plan, insert))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # a plugin's fake ran again and raised; nothing uses its nodes yet
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
        self.taken |= dict.fromkeys(found.removed, found.anchor.name)
        left = {n for node in found.removed for n in node.all_input_nodes} - set(found.removed)
        for node in reversed(found.removed):
            self.graph.erase_node(node)
        coalesced = {node for node in left if node.target in COALESCED}
        for node in coalesced:
            self._drop_parts(node)
        self._sweep(left - coalesced)

    @staticmethod
    def _tensors(plan: Plan, insert: Inserter) -> list[fx.Node]:
        """The nodes of the strategy's tensors, reshaped and added as planned."""
        tensors = []
        for name, addends in plan.inputs.items():
            total: fx.Node | None = None
            for addend in addends:
                node, factor = addend.node, addend.factor
                if name in plan.reshapes and not addend.is_row:
                    node = insert(torch.ops.aten.reshape.default, (node, plan.reshapes[name]))
                if total is not None:
                    total = insert(torch.ops.aten.add.Tensor, (total, node), {} if factor == 1.0 else {"alpha": factor})
                else:
                    total = node if factor == 1.0 else insert(torch.ops.aten.mul.Tensor, (node, factor))
            assert total is not None
            tensors.append(total)
        return tensors

    def _drop_parts(self, node: fx.Node) -> None:
        """Remove the tensors of a coalesced collective that are no longer used."""
        inputs, values = node.args[0], node.meta["val"]
        assert isinstance(inputs, list | tuple)
        used: dict[Any, fx.Node] = {part.args[1]: part for part in node.users}
        retained = sorted(used)
        if not retained:
            self.graph.erase_node(node)
            return
        node.update_arg(0, [inputs[index] for index in retained])
        node.meta["val"] = [values[index] for index in retained]
        for place, index in enumerate(retained):
            used[index].update_arg(1, place)

    def _sweep(self, nodes: Iterable[fx.Node]) -> None:
        """Erase nodes that only the site used: buffers that it wrote into, casts of its weight."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node.op != "call_function" or node.users or node.is_impure() or node not in self.view.position:
                continue
            waiting += node.all_input_nodes
            self.graph.erase_node(node)
            del self.view.position[node]

    def _now(self, node: fx.Node) -> fx.Node:
        """The node of a value after the replacements so far."""
        return self._replaced.get(node, node)

    def _place(self, candidate: Candidate, inputs: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
        """The node after which to insert, and the inputs that must first move to after it.

        It is the last input if that comes before every use and before the next collective. Otherwise it is earlier, and
        the late inputs move up, which is safe if they have no side effects and do not depend on the site. Collectives
        keep their order: ranks pair them in the model's order, which a rank with a graph break in between also has.
        Where the user says that all ranks run the same graphs, by ``merge``, a late input may be computed from a
        collective: the all_reduce of a LoRA adapter then runs before that of its layer.
        """
        position, body, anchor = self.view.position, set(candidate.match.removed), candidate.match.anchor
        uses = [user for node in candidate.match.holders for user in node.users if user not in body]
        first = min(uses, key=position.__getitem__, default=None)
        following = _next_collective(anchor, body)
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
                raise Unplaceable(
                    Reason(
                        "order", found, "all inputs before the next collective", hint="" if self.config.merge else MERGE
                    )
                )
            late.append(node)
            stack.extend(n for n in node.all_input_nodes if position[n] > position[anchor])
        place = max([anchor, *(node for node in inputs if node not in late)], key=position.__getitem__)
        return place, sorted(late, key=position.__getitem__)

    def _may_move(self, node: fx.Node, anchor: fx.Node) -> bool:
        """Whether an operator itself may move up to directly after an all_reduce, its inputs aside."""
        if node.op != "call_function" or _writes(node):
            return False
        communicates = is_collective(node) or node.target is torch.ops._c10d_functional.wait_tensor.default
        if not self.config.merge if communicates else node.is_impure():
            return False
        position = self.view.position
        writes = (position[user] for read in node.all_input_nodes for user in self.view.writers(read))
        return not any(position[anchor] < write < position[node] for write in writes)

    def _sizes(self, shape: tuple[Any, ...]) -> list[int]:
        """A shape as arguments of reshape. One size may be known only at run time, since the others determine it."""
        symbolic = [size for size in shape if not isinstance(size, int)]
        if len(symbolic) > 1:
            found = f"the shape [{', '.join(map(str, shape))}] has {len(symbolic)} symbolic sizes"
            raise Unplaceable(Reason("reshape", found, "at most one where a site changes shape"))
        if symbolic and any(same_size(size, 0) for size in shape):  # next to a 0, reshape cannot infer a size
            found = f"the shape [{', '.join(map(str, shape))}] has a symbolic size next to a 0"
            raise Unplaceable(Reason("reshape", found, "no empty tensor where a site changes shape"))
        return [size if isinstance(size, int) else -1 for size in shape]

    def _trace(self, candidate: Candidate, fakes: dict[str, torch.Tensor]) -> fx.GraphModule:
        """The strategy as a graph of operators, traced once for equal sites."""
        strategy, found = candidate.strategy, candidate.match
        metas = tuple((name, str(TensorMeta.of(fake)), str(fake.stride()), fake.device) for name, fake in fakes.items())
        key = (strategy.name, id(strategy.impl), metas, tuple(found.scalars.items()), tuple(found.outputs))
        if key not in self._traced:
            self._traced[key] = trace(strategy, found, fakes, self.decompositions, self.config)
        return self._traced[key]


def _next_collective(anchor: fx.Node, body: Set[fx.Node]) -> fx.Node | None:
    """The first collective after a site's first one that is not a part of the site."""
    node = anchor.next
    while node.op != "root" and (node in body or not is_collective(node)):
        node = node.next
    return None if node.op == "root" else node


def _writes(node: fx.Node) -> bool:
    arguments = getattr(schema_of(node.target), "arguments", ())
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)


def _results(candidate: Candidate, traced: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The traced outputs by name, checked against the site's."""
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
    """One-byte values viewed as the integer dtype that a site uses for them, such as four E4M3 scales to an int32."""
    holds_bytes = value.dtype.itemsize == 1 and dtype in (torch.uint8, torch.int32) and value.dtype != dtype
    return value.view(dtype) if holds_bytes and same_size(value.shape[-1] % dtype.itemsize, 0) else value
