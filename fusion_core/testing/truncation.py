"""A pattern's definition with conversions that truncate instead of rounding to nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.site import Site
from fusion_core.vocabulary.operation import Symbol

TRUNCATING = {"gfx942": torch.bfloat16}
"""Architecture → the dtype to which conversions truncate there: AMD's kernels convert by hand (aiter#5151)."""


def truncates(site: Site) -> bool:
    """Whether kernels truncate at this site."""
    return TRUNCATING.get(site.device.arch) == site.inputs["x"].dtype


def truncated(pattern: Pattern, site: Site, given: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    """The definition in float32, with each computed value except codes and scales truncated to x's dtype.

    Args:
        pattern: The pattern.
        site: The site, for its scalars.
        given: The pattern's tensors by name.
        group: The process group's name.
    """
    dtype = site.inputs["x"].dtype
    values: dict[Any, Any] = dict.fromkeys(pattern.tensors) | dict(site.attributes) | {GROUP: group}
    values |= {name: tensor.float() if tensor.dtype == dtype else tensor for name, tensor in given.items()}
    for step in pattern.steps:
        operands = {
            name: values.get(operand if operand.step else operand.name, _default(pattern, operand))
            if isinstance(operand, Symbol)
            else operand
            for name, operand in step.operands.items()
        }
        quantizes = step.operation.name.startswith("quantize_")
        if not quantizes and "dtype" in operands:
            operands["dtype"] = torch.float32
        results = step.operation.function(**operands)
        for symbol, result in zip(step.results, results if isinstance(results, tuple) else (results,), strict=True):
            values[symbol] = result if quantizes else _truncate(result)
    found = {name: values[symbol] for name, symbol in zip(pattern.outputs, pattern.values, strict=True)}
    floats = {
        symbol for step in pattern.steps if not step.operation.name.startswith("quantize_") for symbol in step.results
    }
    return {
        name: found[name].to(dtype) if symbol in floats else found[name]
        for name, symbol in zip(pattern.outputs, pattern.values, strict=True)
    }


def _default(pattern: Pattern, operand: Symbol) -> Any:
    return pattern.parameters[operand.name].default if operand.name in pattern.parameters else None


def _truncate(value: Tensor) -> Tensor:
    """Float32 values without the bits that bfloat16 lacks."""
    bits = value.contiguous().view(torch.int32)
    return torch.where(value.isnan(), value, (bits & -65536).view(torch.float32))
