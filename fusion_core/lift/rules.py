"""Rules that read operators as products, and their table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fusion_core._torch.operators import OpOverload, names_of, schema_of
from fusion_core.lift.algebra import Product
from fusion_core.reason import Reason

Read = Callable[[Any], Product]
Rule = Callable[[fx.Node, Read], Product | Reason | None]
"""Takes a node and a function from an argument to its product. Returns the node's product, None for a new tensor of
which nothing more is known, or a `Reason`: the same as None, with a near miss that a report may name."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Rules(dict[Any, Rule]):
    """Rules by operator."""

    def reads(self, *targets: Any) -> Callable[[Rule], Rule]:
        """Decorator that makes a function the rule of these operators."""

        def register(rule: Rule) -> Rule:
            self.update(dict.fromkeys(targets, rule))
            return rule

        return register


def is_cheap(node: fx.Node) -> bool:
    """Whether a node is a view, a copy or elementwise."""
    if not isinstance(node.target, OpOverload):
        return False
    is_view = any(value.alias_info is not None for value in schema_of(node.target).returns)
    is_elementwise = torch.Tag.pointwise in node.target.tags or node.target is torch.ops.aten.copy.default
    return not node.is_impure() and (is_view or is_elementwise)


def called(node: fx.Node) -> str:
    """The name of a node's operation, as in the model if torch recorded that: ``clamp`` instead of ``clamp_min``."""
    origin = node.meta.get("original_aten")
    if isinstance(origin, OpOverload) and origin.namespace == "aten":
        return names_of(origin)[0]
    return re.sub(r"(_\d+)+$", "", node.name)


def writers(node: fx.Node) -> Iterator[fx.Node]:
    """The users that write into a node's memory, directly or through views."""
    for user in node.users:
        arguments = getattr(schema_of(user.target), "arguments", ())
        for argument, value in zip(arguments, user.args, strict=False):
            if value is not node or argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                yield user
            else:
                yield from writers(user)
