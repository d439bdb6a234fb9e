"""One application of an operator: its arguments by name, and the node of each result.

A functional operator is a node by itself. One that writes into arguments is wrapped in ``auto_functionalized`` or
``auto_functionalized_v2``, which copies those arguments first and returns their values after the call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_core._torch.operators import OpOverload, schema_of
from fusion_core.lift.algebra import same_shape, same_size
from fusion_core.lift.term import Virtual
from fusion_core.reason import Reason
from fusion_core.site import TensorMeta

BY_ARGUMENT = torch.ops.higher_order.auto_functionalized
BY_BASE = torch.ops.higher_order.auto_functionalized_v2
WRAPPERS = (BY_ARGUMENT, BY_BASE)

Result = fx.Node | Virtual | Reason


@dataclass(frozen=True, eq=False, slots=True)
class OperatorCall:
    """One application of an operator.

    Attributes:
        node: The node, which may be a wrapper around the operator.
        schema: The operator's schema.
        arguments: Argument name → node, scalar or None, defaults filled in; a `Reason` if there is no node.
        results: Index of a returned value, or name of an argument that is written into → the node with its value
            after the call, or the reason why that is unknown.
        values: Argument names and indices of returned values → a `TensorMeta` or a scalar, as known before run time.
    """

    node: fx.Node
    schema: Any
    arguments: Mapping[str, Any]
    results: Mapping[int | str, Result]
    values: Mapping[int | str, Any]

    @property
    def name(self) -> str:
        """The operator's qualified name."""
        return str(self.schema.name)


def operator_of(node: fx.Node) -> OpOverload | None:
    """The operator that a node applies, directly or through a wrapper; None if it applies none."""
    target: Any = node.args[0] if node.target in WRAPPERS else node.target
    return target if isinstance(target, OpOverload) else None


def operator_call(node: fx.Node) -> OperatorCall | None:
    """The call in a node; None if it writes into its arguments in place, so that their new values have no node."""
    applied = operator_of(node)
    assert applied is not None
    schema = schema_of(applied)
    reader = _Reader(node, schema)
    if node.target is BY_ARGUMENT:
        reader.by_argument()
    elif node.target is BY_BASE:
        reader.by_base(is_out=torch.Tag.out in applied.tags)
    elif schema.is_mutable:
        return None
    else:
        reader.functional()
    return OperatorCall(node, schema, reader.arguments, reader.results, reader.values)


class _Reader:
    """Fills in a call from its node, which has one of three forms."""

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
        self.results: dict[int | str, Result] = {}
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

        ``_all_bases`` contains the bases; ``_<name>_base_index`` and similar keywords locate each argument in them.
        """
        extra: dict[str, Any] = dict(self.node.kwargs)
        self.arguments |= {a.name: extra.pop(a.name) for a in self.schema.arguments if a.name in extra}
        if is_out:  # the wrapper allocates the operator's tensors and returns only them
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

    def _pick(self, index: int, name: str) -> fx.Node | Virtual:
        return self.picked.get(index) or Virtual(self.node, f"{name} of {self.schema.name}")

    def _shared(self, name: str, base: fx.Node) -> Reason:
        found = f"{name} of {self.schema.name} shares the memory of {base.name} with another written argument"
        return Reason("view", found, "a tensor of its own", name)


def _known(value: Any) -> Any:
    """An argument as known before run time: a `TensorMeta`, a tuple, or the value."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.Tensor):
        return TensorMeta.of(value)
    return tuple(map(_known, value)) if isinstance(value, tuple | list) else value


def _view(after: fx.Node | Virtual, meta: TensorMeta, offset: Any) -> fx.Node | Virtual | None:
    """The node of a view of a base after the call, if nothing else of the base is used; else None."""
    if isinstance(after, Virtual) or not after.users:
        return after if isinstance(after, Virtual) else Virtual(after, after.name)
    user = next(iter(after.users))
    value = user.meta.get("val")
    if len(after.users) > 1 or not isinstance(value, torch.Tensor) or not _is_view(user) or meta.stride is None:
        return None
    same = same_shape(value.shape, meta.shape) and same_shape(value.stride(), meta.stride)
    return user if same and same_size(value.storage_offset(), _known(offset)) else None


def _is_view(node: fx.Node) -> bool:
    returns: Any = getattr(schema_of(node.target), "returns", ())
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write
