"""Operators as they are in torch's graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

__all__ = ["HigherOrderOperator", "OpOverload", "names_of", "schema_of"]


def schema_of(function: Any) -> Any:
    """The schema of an operator: of an overload, a packet or what `custom_op` returns; None for a function."""
    if isinstance(function, OpOverload):
        return function._schema
    for holder in (function, getattr(function, "_opoverload", None), getattr(function, "default", None)):
        if isinstance(schema := getattr(holder, "_schema", None), torch.FunctionSchema):
            return schema
    return None


def names_of(operator: OpOverload) -> tuple[str, str]:
    """The names of an operator and of its overload, without a namespace: ``("add", "Tensor")``."""
    return str(operator._opname), str(operator._overloadname)
