"""How one operator reads: a rule, and the table of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import Meaning
from fusion_core.reason import Reason

Read = Callable[[Any], Meaning]
Rule = Callable[[fx.Node, Read], Meaning | Reason | None]
"""From a node and a function from an argument to its meaning, the node's meaning; None for "a new tensor about which
nothing more is known", or a reason where that is a near miss that a user may want to hear of."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Rules(dict[Any, Rule]):
    """Rules by operator."""

    def reads(self, *targets: Any) -> Callable[[Rule], Rule]:
        """Make the function below the rule of these operators."""

        def register(rule: Rule) -> Rule:
            self.update(dict.fromkeys(targets, rule))
            return rule

        return register


def is_cheap(node: fx.Node) -> bool:
    """Whether a node is a view or works element by element."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    is_view = any(value.alias_info is not None for value in node.target._schema.returns)
    return not node.is_impure() and (is_view or torch.Tag.pointwise in node.target.tags)


def called(node: fx.Node) -> str:
    """What a node does, in the model's words where torch has kept them: ``clamp``, not the ``clamp_min`` of it."""
    origin = node.meta.get("original_aten")
    if isinstance(origin, torch._ops.OpOverload) and origin.namespace == "aten":
        return str(origin._opname)
    return re.sub(r"(_\d+)+$", "", node.name)


def writers(node: fx.Node) -> Iterator[fx.Node]:
    """The users that write into a node's memory, looked for through views of it."""
    for user in node.users:
        arguments = getattr(getattr(user.target, "_schema", None), "arguments", ())
        for argument, value in zip(arguments, user.args, strict=False):
            if value is not node or argument.alias_info is None:
                continue
            if argument.alias_info.is_write:
                yield user
            else:
                yield from writers(user)
