"""One application of an operator: its arguments by name, and which node holds each of its results.

A functional operator is a node by itself. One that writes into arguments stands inside ``auto_functionalized`` or
``auto_functionalized_v2``, with which torch copies those arguments first and gives back what they hold afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fusion_core.lift.algebra import same_shape, same_size
from fusion_core.lift.term import Unheld
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta

BY_ARGUMENT = torch.ops.higher_order.auto_functionalized
BY_BASE = torch.ops.higher_order.auto_functionalized_v2
WRAPPERS = (BY_ARGUMENT, BY_BASE)

Held = fx.Node | Unheld | Reason


@dataclass(frozen=True, eq=False, slots=True)
class Application:
    """One application of an operator.

    Attributes:
        node: The node, which may be a wrapper around the operator.
        schema: The operator's schema.
        arguments: Argument name → node, scalar or None, defaults filled in; a `Reason` for what no node holds.
        results: Index of a returned value, or name of an argument that is written into → the node that holds it
            afterwards, or why it cannot be told.
        values: Argument names and indexes of returned values → what is known before run time: a `TensorMeta`, a scalar.
    """

    node: fx.Node
    schema: Any
    arguments: Mapping[str, Any]
    results: Mapping[int | str, Held]
    values: Mapping[int | str, Any]

    @property
    def name(self) -> str:
        """The operator's qualified name."""
        return str(self.schema.name)


def operator_of(node: fx.Node) -> OpOverload | None:
    """The operator that a node applies, by itself or through a wrapper; None where it is no operator."""
    target: Any = node.args[0] if node.target in WRAPPERS else node.target
    return target if isinstance(target, OpOverload) else None


def application(node: fx.Node) -> Application | None:
    """What a node applies; None where it writes into its arguments in place, so that no node holds what they become."""
    applied = operator_of(node)
    assert applied is not None
    reader = _Reader(node, applied._schema)
    if node.target is BY_ARGUMENT:
        reader.by_argument()
    elif node.target is BY_BASE:
        reader.by_base(is_out=torch.Tag.out in applied.tags)
    elif applied._schema.is_mutable:
        return None
    else:
        reader.functional()
    return Application(node, applied._schema, reader.arguments, reader.results, reader.values)


class _Reader:
    """Fills in an application, in the way that its node asks for."""

    def __init__(self, node: fx.Node, schema: Any) -> None:
        self.node = node
        self.schema = schema
        self.written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.returned = len(schema.returns)
        self.picked: dict[int, fx.Node] = {}
        for user in node.users:
            if user.target is operator.getitem:
                self.picked.setdefault(user.args[1], user)  # type: ignore[arg-type]
        self.arguments = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        self.results: dict[int | str, Held] = {}
        self.values: dict[int | str, Any] = {}

    def functional(self) -> None:
        """A node of a functional operator."""
        names = (argument.name for argument in self.schema.arguments)
        self.arguments |= dict(zip(names, self.node.args, strict=False)) | dict(self.node.kwargs)
        self._returns(self.node if self.returned == 1 else None)

    def by_argument(self) -> None:
        """``auto_functionalized(op, **arguments)``: the returned values, then the written arguments in order."""
        self.arguments |= dict(self.node.kwargs)
        self._returns()
        given = [self.arguments[name] for name in self.written]
        for index, name in enumerate(self.written, max(1, self.returned)):
            argument = self.arguments[name]
            if isinstance(argument, fx.Node):
                shared = given.count(argument) > 1
                self.results[name] = self._shared(name, argument) if shared else self._pick(index, name)
            elif argument is not None:
                self.results[name] = Reason("list", f"{name} of {self.schema.name} is a list", "a tensor", name)

    def by_base(self, *, is_out: bool) -> None:
        """``auto_functionalized_v2(op, **arguments)``: the returned values, then the bases of written arguments.

        ``_all_bases`` holds the bases; ``_<name>_base_index`` and its like say how each argument lies in them.
        """
        extra: dict[str, Any] = dict(self.node.kwargs)
        self.arguments |= {a.name: extra.pop(a.name) for a in self.schema.arguments if a.name in extra}
        if is_out:  # the operator's tensors are made inside the wrapper, which returns just them
            for index, name in enumerate(self.written):
                made = self.node if len(self.written) == 1 else None
                self.arguments[name] = Reason("out", f"{name} of {self.schema.name} is only written", "an input", name)
                size, stride, dtype = (extra[f"_{name}_{key}"] for key in ("size", "stride", "dtype"))
                self.results[name] = made or self._pick(index, name)
                self.values[name] = TensorMeta(_known(size), dtype, _known(stride))
            self._arguments_known()
            return
        self._returns()
        bases = extra["_all_bases"]
        indexes = {name: extra.get(f"_{name}_base_index") for name in self.written}
        for name, base_index in indexes.items():
            if base_index is None:
                self.arguments[name] = None
                continue
            base, after = bases[base_index], self._pick(max(1, self.returned) + base_index, name)
            if list(indexes.values()).count(base_index) > 1:
                self.arguments[name], self.results[name] = base, self._shared(name, base)
            elif f"_{name}_slice_dim" in extra or f"_{name}_size" in extra:
                found = f"{name} of {self.schema.name} is a view of {base.name}"
                view = Reason("view", found, "a tensor of its own", name)
                self.arguments[name], self.results[name] = view, view
                if f"_{name}_size" in extra:
                    size, stride = (_known(extra[f"_{name}_{key}"]) for key in ("size", "stride"))
                    self.values[name] = meta = TensorMeta(size, base.meta["val"].dtype, stride)
                    self.results[name] = _view(after, meta, extra[f"_{name}_storage_offset"]) or view
            else:
                self.arguments[name], self.results[name] = base, after
        self._arguments_known()

    def _returns(self, whole: fx.Node | None = None) -> None:
        value = self.node.meta.get("val")
        for index in range(self.returned):
            self.results[index] = whole or self._pick(index, f"result {index}")
            self.values[index] = _known(value if whole else value[index] if isinstance(value, tuple | list) else None)
        self._arguments_known()

    def _arguments_known(self) -> None:
        for name, argument in self.arguments.items():
            self.values.setdefault(name, _known(argument))

    def _pick(self, index: int, name: str) -> fx.Node | Unheld:
        return self.picked.get(index) or Unheld(self.node, f"{name} of {self.schema.name}")

    def _shared(self, name: str, base: fx.Node) -> Reason:
        found = f"{name} of {self.schema.name} shares the memory of {base.name} with another written argument"
        return Reason("view", found, "a tensor of its own", name)


def _known(value: Any) -> Any:
    """What is known of an argument before run time."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        return TensorMeta.of(value)
    return tuple(map(_known, value)) if isinstance(value, tuple | list) else value


def _view(after: fx.Node | Unheld, meta: TensorMeta, offset: Any) -> fx.Node | Unheld | None:
    """The node that holds a view of a base afterwards, where it is all that is used of the base; None otherwise."""
    if isinstance(after, Unheld) or not after.users:
        return after if isinstance(after, Unheld) else Unheld(after, after.name)
    user = next(iter(after.users))
    value = user.meta.get("val")
    if len(after.users) > 1 or not isinstance(value, torch.Tensor) or not _is_view(user) or meta.stride is None:
        return None
    same = same_shape(value.shape, meta.shape) and same_shape(value.stride(), meta.stride)
    return user if same and same_size(value.storage_offset(), _known(offset)) else None


def _is_view(node: fx.Node) -> bool:
    returns: Any = getattr(getattr(node.target, "_schema", None), "returns", ())
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write
