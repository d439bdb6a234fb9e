"""The workers' jobs: run a strategy at a site and compare it with the pattern. Imports no test library."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core._torch.operators import schema_of
from fusion_core._torch.tensors import FakeTensorMode
from fusion_core.config import FusionConfig
from fusion_core.dispatch.means import function_of
from fusion_core.patterns.definition import GROUP, Pattern
from fusion_core.plugins.strategy import Strategy
from fusion_core.samples.tensors import Values, build_tensors
from fusion_core.site import Site, TensorMeta
from fusion_core.testing.subject import Subject
from fusion_core.testing.tolerance import Excess, excess
from fusion_core.testing.truncation import truncated, truncates

WIDE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Outcome:
    """The outcome of one example on one rank.

    Attributes:
        problems: What is wrong with the form of the results: their number, shapes, dtypes.
        excesses: The worst row of each live output that can be compared.
        changed: Inputs whose bits changed.
        bits: A digest of each live output.
    """

    problems: list[str] = field(default_factory=list)
    excesses: list[Excess] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    bits: dict[str, str] = field(default_factory=dict)


def compare(subject: Subject, site: Site, values: Values) -> Outcome:
    """Run one example and compare it with the definition."""
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    given = tensors(site, values)
    before = {name: _memory(tensor) for name, tensor in given.items()}
    with torch.no_grad():
        returned = call(subject.strategy, subject.pattern, site, given, group)
    outcome = Outcome(changed=[name for name in given if not torch.equal(_memory(given[name]), before[name])])
    _judge(outcome, subject, site, values, returned, group)
    return outcome


def compare_in_turn(subject: Subject, site: Site, all_values: Sequence[Values]) -> list[Outcome]:
    """Run examples of one form alternately on two process groups, and compare all results after the last call."""
    groups = (dist.group.WORLD.group_name, _second_group())  # type: ignore[union-attr]
    runs = []
    for values in all_values:
        for group in groups:
            with torch.no_grad():
                returned = call(subject.strategy, subject.pattern, site, tensors(site, values), group)
            runs.append((values, group, returned, _bits_by_name(subject, returned)))
    outcomes = []
    for values, group, returned, bits in runs:
        now = _bits_by_name(subject, returned)
        lost = [name for name in bits if bits[name] != now.get(name)]
        needs = "needs memory of its own for the results of each call"
        outcome = Outcome([f"a later call overwrote {', '.join(lost)}, {needs}"] if lost else [])
        _judge(outcome, subject, site, values, returned, group)
        outcomes.append(outcome)
    return outcomes


def _bits_by_name(subject: Subject, returned: Any) -> dict[str, str]:
    return {name: _bits(result) for name, result in by_name(subject.strategy, subject.pattern, returned)[0].items()}


def bits_of_the_first_row(subject: Subject, site: Site, values: Values, batches: Sequence[int]) -> list[dict[str, str]]:
    """A digest of each live output's first row, for batches that start with the same rows."""
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    found = []
    for rows in batches:
        given = {
            name: tensor[:rows].clone() if name == "x" or name in subject.pattern.elementwise else tensor
            for name, tensor in tensors(site, values).items()
        }
        with torch.no_grad():
            returned = call(subject.strategy, subject.pattern, site, given, group)
        results, problems = by_name(subject.strategy, subject.pattern, returned)
        assert not problems, problems
        found.append({name: _bits(results[name][:1]) for name in site.outputs})
    return found


@functools.cache
def _second_group() -> str:
    return str(dist.new_group().group_name)


def _judge(outcome: Outcome, subject: Subject, site: Site, values: Values, returned: Any, group: str) -> None:
    """Compare the results of a strategy with the definition and the oracle, and record that in ``outcome``."""
    pattern = subject.pattern
    results, problems = by_name(subject.strategy, pattern, returned)
    outcome.problems += problems
    definitions = [
        definition(pattern, site, tensors(site, values, shift, flushed), group)
        for shift, flushed in _runs(site, values, pattern.by_rank)
    ]
    if truncates(site):
        definitions.append(truncated(pattern, site, tensors(site, values), group))
    for name in [name for name in site.outputs if name in results]:
        found, needs = TensorMeta.of(results[name]), TensorMeta.of(definitions[0][name])
        if (found.shape, found.dtype) != (needs.shape, needs.dtype):
            outcome.problems.append(f"gives {name} as {found}, needs {needs}")
    if outcome.problems:
        return
    given = tensors(site, values)
    oracle = definition(pattern, site, wide(pattern, given), group, exact=True)
    arguments = {**given, **site.attributes}
    outcome.excesses = excess(pattern, list(site.outputs), results, definitions, oracle, arguments)
    outcome.bits = {name: _bits(results[name]) for name in site.outputs}


def written(impl: Callable[..., Any]) -> frozenset[str]:
    """The arguments that an operator's schema declares as written."""
    arguments = getattr(schema_of(impl), "arguments", ())
    return frozenset(each.name for each in arguments if each.alias_info is not None and each.alias_info.is_write)


def operator_name(impl: Callable[..., Any]) -> str:
    """An operator's name in graphs, without its overload; empty for a function."""
    schema = schema_of(impl)
    return "" if schema is None else str(schema.name).replace("::", ".")


def call(strategy: Strategy, pattern: Pattern, site: Site, given: Mapping[str, Tensor], group: str) -> Any:
    """Call the strategy's impl with these tensors, by the rules of `Strategy.impl`."""
    return function_of(strategy, pattern)(**_arguments(strategy, pattern, site, given, group))


def _arguments(
    strategy: Strategy, pattern: Pattern, site: Site, given: Mapping[str, Tensor], group: str
) -> dict[str, Any]:
    accepted = strategy.accepts(pattern)
    scalars = {name: value for name, value in {**site.attributes, GROUP: group}.items() if name in accepted}
    return {**dict.fromkeys(pattern.tensors), **given, **scalars, **strategy.settings(pattern, FusionConfig())}


def by_name(strategy: Strategy, pattern: Pattern, returned: Any) -> tuple[dict[str, Any], list[str]]:
    """The results of an impl by output name, and what is wrong with their form."""
    names = pattern.outputs if strategy.outputs is None else strategy.outputs
    values = returned if isinstance(returned, tuple | list) else (returned,)
    if len(values) != len(names):
        return {}, [f"returns {len(values)} values, needs {len(names)}: {', '.join(names)}"]
    odd = [
        f"gives {name} as {type(v).__name__}, needs a tensor"
        for name, v in zip(names, values, strict=True)
        if not isinstance(v, Tensor)
    ]
    return ({}, odd) if odd else (dict(zip(names, values, strict=True)), [])


def _runs(site: Site, values: Values, by_rank: bool) -> list[tuple[int, bool]]:
    """The runs of the definition: the shift of the ranks, and whether subnormal numbers are flushed.

    The ranks keep their places if the results are of each rank's own part.
    """
    runs = [(shift, False) for shift in range(site.world_size if site.world_size > 2 and not by_rank else 1)]
    return [*runs, (0, True)] if "subnormal" in values.rows else runs


def tensors(site: Site, values: Values, shift: int = 0, flushed: bool = False) -> dict[str, Tensor]:
    """The tensors of the rank ``shift`` places after this one, with subnormal numbers flushed or not."""
    device = torch.device("cuda", torch.cuda.current_device()) if site.device.type == "cuda" else None
    built = build_tensors(site, values, (dist.get_rank() + shift) % dist.get_world_size(), device)
    if flushed:
        for tensor in built.values():
            if tensor.dtype in (torch.bfloat16, torch.float32):
                tensor[tensor.abs() < torch.finfo(tensor.dtype).smallest_normal] = 0.0
    return built


def definition(
    pattern: Pattern, site: Site, given: Mapping[str, Tensor], group: str, exact: bool = False
) -> dict[str, Tensor]:
    """The results of the pattern's definition; ``exact`` replaces dtypes among the scalars by float64."""
    scalars = {
        name: torch.float64 if exact and value in WIDE else value
        for name, value in site.attributes.items()
        if name in pattern.parameters
    }
    with torch.no_grad():
        returned = pattern.function(**{**dict.fromkeys(pattern.tensors), **given}, **scalars, **{GROUP: group})
    return dict(zip(pattern.outputs, returned if isinstance(returned, tuple) else (returned,), strict=True))


def wide(pattern: Pattern, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float64, except those that a quantising operation takes as float32 by definition."""
    scales = {
        getattr(operand, "name", None)
        for step in pattern.steps
        if step.operation.name.startswith("quantize_")
        for operand in step.operands.values()
    }
    return {name: tensor if name in scales else tensor.double() for name, tensor in given.items()}


def _memory(tensor: Tensor) -> Tensor:
    """A copy of all bytes behind a tensor, gaps included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


def _share(one: Tensor, other: Tensor) -> bool:
    return one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _bits(tensor: Tensor) -> str:
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return hashlib.sha256(ctypes.string_at(plain.data_ptr(), plain.nbytes)).hexdigest()[:16]


def fakes_and_results(subject: Subject, site: Site, values: Values) -> list[str]:
    """The differences between a strategy's fake and real results, and the errors of `torch.library.opcheck`."""
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    strategy, pattern = subject.strategy, subject.pattern
    given = tensors(site, values)
    mode = FakeTensorMode()
    with torch.no_grad(), mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in given.items()}
        faked, problems = by_name(strategy, pattern, call(strategy, pattern, site, fakes, group))
    problems = [f"the fake {problem}" for problem in problems]
    with torch.no_grad():
        real, wrong = by_name(strategy, pattern, call(strategy, pattern, site, given, group))
    problems += wrong
    for name in real if faked else ():
        if _form(faked[name]) != _form(real[name]):
            problems.append(f"the fake gives {name} as {_form(faked[name])}, the real one {_form(real[name])}")
        owners = [each for each, tensor in given.items() if _share(real[name], tensor)]
        if owners:  # a graph may use an input's memory for something else once nothing reads the input any more
            problems.append(f"{name} is in the memory of {owners[0]}, needs memory of its own")
    # torch's opcheck raises where it copies a tensor with two sizes of 0
    several_empty = any(list(meta.shape).count(0) > 1 for meta in site.inputs.values())
    if not problems and not several_empty and schema_of(strategy.impl) is not None:
        arguments = _arguments(strategy, pattern, site, tensors(site, values), group)
        try:
            torch.library.opcheck(
                cast(Any, strategy.impl), (), arguments, test_utils=("test_schema", "test_faketensor")
            )
        except Exception as error:  # noqa: BLE001  # opcheck raises its own classes, torch's and the operator's
            problems.append(f"torch.library.opcheck raises {type(error).__name__}: {error}")
    return problems


def _form(tensor: Tensor) -> str:
    """Shape, dtype, device and the strides of dimensions above 1, the only ones that matter."""
    walked = [step for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]
    return f"{TensorMeta.of(tensor)} on {tensor.device}, strides {walked} where a size is above 1"
