"""The largest error that a result may have against the float64 oracle. It depends on the pattern, not the backend.

The bound is measured, not chosen. The pattern's own definition runs unfused in the given dtypes on the same group. A
fused result may have 1.5 times its error (the project's factor for "never a different answer"), plus the differences
between correct spellings of one computation:

- one rounding in the output's dtype, of the row's largest value, as a value may be rounded at another step;
- four roundings in float32, in which a norm is computed, as its sum may have another order;
- if only a quantisation reads the norm, one rounding of the norm in x's dtype: kernels quantise the norm as they would
  have returned it, even if the model keeps it in float32;
- one smallest normal number of the output's dtype, since GPUs flush subnormal numbers.

A scale at the quantisation's floor is judged only by its codes, if the floor is at most 1e-5. Such a floor only keeps a
division finite, and kernels with another floor, or none, write another scale with the same meaning.

A row's own error may be small by luck, and among thousands of rows some are. So the definition's error in a row counts
as at least the largest that it has in any row, in units of that row's largest value. That share is at most one rounding
per step of the chain, so a row in which values cancel does not loosen the others' bounds.

The definition's error is the largest over its runs: with the ranks in every cyclic order, since the vocabulary leaves
the order of the sum to the process group, and with subnormal inputs flushed. On a GPU whose kernels truncate instead of
rounding to nearest (`fusion_core.testing.truncation`), one more run truncates. That is a weaker guarantee than
elsewhere, and such a backend's documentation has to state it.

Each row is judged by itself, so that a huge row does not hide errors in others. Elements are not judged one by one:
rounding before or after the weight changes small elements by more than the bound. A row in which the definition is not
finite allows any result; its effect on other rows is judged there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_core.patterns.definition import Pattern
from fusion_core.vocabulary.fp4 import dequantize_mxfp4, dequantize_nvfp4
from fusion_core.vocabulary.fp8 import dequantize_fp8
from fusion_core.vocabulary.operation import Step, Symbol

FACTOR = 1.5
LARGEST_FLOOR = 1e-5
"""The largest floor of a dynamic FP8 scale that only keeps a division finite; those in use are 0 to 1 / (512 * 240)."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Results = Mapping[str, Tensor]


@dataclass(frozen=True)
class Excess:
    """The worst row of one output: its error and its bound.

    Attributes:
        output: The output's name; ``"quantized, dequantised"`` for codes.
        row: The row's index, with all leading dimensions flattened.
        error: The largest difference from the oracle in that row.
        bound: The largest error allowed.
    """

    output: str
    row: int
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound


def excess(
    pattern: Pattern,
    names: Sequence[str],
    result: Results,
    definitions: Sequence[Results],
    oracle: Results,
    arguments: Mapping[str, Any],
) -> list[Excess]:
    """The worst row of each output that can be compared.

    Codes of a quantisation are dequantised with their scales and then compared. Scales in a format other than float32
    are compared only in this way.

    Args:
        pattern: The pattern.
        names: The outputs to compare.
        result: The results by output; codes need their scales too.
        definitions: The definition's results in the given dtypes, one entry per run.
        oracle: The definition's results in float64.
        arguments: The pattern's tensors and scalars.
    """
    found = []
    for name in names:
        step = _step(pattern, name)
        if name not in result or step is None:
            continue
        steps = pattern.steps.index(step) + 1
        codes = DEQUANTIZE.get(step.operation.name)
        if codes is None:
            if (own := result[name].dtype) in FLOATS:
                found.append(_worst(name, result[name], [d[name] for d in definitions], oracle[name], (own,), steps))
            continue
        source = _name(pattern, step.operands["x"])
        dtype = definitions[0][source].dtype if source in oracle else torch.float32
        given = arguments["x"].dtype
        if source not in names and torch.finfo(given).eps > torch.finfo(dtype).eps:
            dtype = given
        if step.results[0] is _symbol(pattern, name):
            exact = oracle[source] if source in oracle else codes(_resolved(pattern, step, oracle, arguments))
            values = [codes(_resolved(pattern, step, each, arguments)) for each in (result, *definitions)]
            more = _code_step(step, arguments)
            found.append(_worst(f"{name}, dequantised", values[0], values[1:], exact, (dtype,), steps, more))
        elif result[name].dtype == torch.float32 and arguments.get("scale_format", "float32") == "float32":
            exact = oracle[name].double()
            scale = torch.where(exact <= _floor(arguments), exact, result[name].double())
            found.append(_worst(name, scale, [d[name] for d in definitions], exact, (dtype, torch.float32), steps))
    return found


def _worst(
    name: str,
    result: Tensor,
    definitions: Sequence[Tensor],
    oracle: Tensor,
    roundings: tuple[torch.dtype, ...],
    steps: int,
    more: float = 0.0,
) -> Excess:
    """The row with the largest error in units of its bound.

    Args:
        name: The output's name, for the message.
        result: The result.
        definitions: The definition's results.
        oracle: The exact values.
        roundings: Dtypes in each of which the row's largest value may be rounded once more.
        steps: The number of steps of the chain up to this output.
        more: An additional share of the row's largest value: one step of a code.
    """
    if oracle.numel() == 0:
        return Excess(name, 0, 0.0, 0.0)
    rows = oracle.double().reshape(-1, oracle.shape[-1] if oracle.dim() else 1)
    errors = [(each.double().reshape(rows.shape) - rows).abs().amax(-1) for each in (result, *definitions)]
    error, allowed = errors[0], torch.stack(errors[1:]).amax(0)
    largest = rows.abs().amax(-1)
    relative = sum(torch.finfo(dtype).eps / 2 for dtype in roundings) + 4 * torch.finfo(torch.float32).eps / 2 + more
    usual = (allowed / largest).nan_to_num(0.0, 0.0).amax().clamp(max=steps * torch.finfo(roundings[0]).eps / 2)
    allowed = torch.maximum(allowed, usual * largest)
    bound = FACTOR * allowed + largest * relative + max(torch.finfo(dtype).smallest_normal for dtype in roundings)
    error = error.nan_to_num(torch.inf, torch.inf)
    ratio = torch.where(allowed.isfinite() & largest.isfinite(), error / bound, 0.0)
    row = int(ratio.argmax())
    if float(ratio[row]) == 0.0:
        return Excess(name, row, 0.0, 0.0)
    return Excess(name, row, float(error[row]), float(bound[row]))


def _code_step(step: Step, arguments: Mapping[str, Any]) -> float:
    """One step of a code at a row's largest value, if scales are themselves rounded coarsely; else 0.

    A power-of-two scale doubles when the row's maximum crosses a power of two, which the last bit of the norm may
    decide. An E4M3 scale moves by one step likewise. With float32 scales a code differs only at a tie, where both codes
    have the same error.
    """
    if step.operation.name in ("quantize_nvfp4", "quantize_mxfp4"):
        return 1 / 3  # from 4 to 6
    scale_format = arguments.get("scale_format", "float32")
    return 2.0**-3 if scale_format != "float32" else 0.0


def _floor(arguments: Mapping[str, Any]) -> float:
    """The floor of a dynamic FP8 scale if it only keeps a division finite; 0 for a larger floor or none."""
    given = arguments.get("min_scale")
    if given is None:
        largest = arguments.get("fp8_max") or torch.finfo(arguments.get("fp8_dtype", torch.float8_e4m3fn)).max
        given = 1 / (512 * largest)
    return float(torch.tensor(given, dtype=torch.float32)) if given <= LARGEST_FLOOR else 0.0


def _symbol(pattern: Pattern, name: str) -> Symbol:
    return pattern.values[pattern.outputs.index(name)]


def _step(pattern: Pattern, name: str) -> Step | None:
    return _symbol(pattern, name).step if name in pattern.outputs else None


def _name(pattern: Pattern, symbol: Any) -> str:
    """The name of the output that a symbol is; empty if it is no output."""
    return next((name for name, value in zip(pattern.outputs, pattern.values, strict=True) if value is symbol), "")


def _resolved(pattern: Pattern, step: Step, results: Results, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The known operands of a quantisation and its results, by the operation's own names."""
    values: dict[str, Any] = {}
    for name, operand in step.operands.items():
        if not isinstance(operand, Symbol):
            values[name] = operand
        elif operand.step is None:
            values[name] = arguments.get(operand.name)
    for symbol in step.results:
        values[symbol.name] = results[_name(pattern, symbol)]
    return values


DEQUANTIZE: dict[str, Callable[[Mapping[str, Any]], Tensor]] = {
    "quantize_static_fp8": lambda v: dequantize_fp8(v["quantized"], v["scale"], dtype=torch.float64),
    "quantize_token_fp8": lambda v: dequantize_fp8(v["quantized"], v["scale"], dtype=torch.float64),
    "quantize_group_fp8": lambda v: dequantize_fp8(
        v["quantized"], v["scale"], group_size=v["group_size"], dtype=torch.float64
    ),
    "quantize_nvfp4": lambda v: dequantize_nvfp4(
        v["quantized"], v["scale"], v["global_scale"], scale_layout=v["scale_layout"], dtype=torch.float64
    ),
    "quantize_mxfp4": lambda v: dequantize_mxfp4(v["quantized"], v["scale"], dtype=torch.float64),
}
"""Quantising operation → its dequantisation in float64."""
