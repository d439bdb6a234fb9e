"""Sites for testing a strategy: consistent with their pattern, and changed until they meet its requirements."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from fusion_core.errors import FusionError, PatternError
from fusion_core.patterns.definition import GROUP, VECTORS, Parameter, Pattern
from fusion_core.plugins.requirements import Requirement
from fusion_core.plugins.strategy import Strategy
from fusion_core.samples.layouts import empty, laid_out, strides
from fusion_core.samples.requirement_sides import sides
from fusion_core.site import Device, Dim, Site, TensorMeta
from fusion_core.vocabulary.operation import Symbol

SCALES = ("scale", "global_scale")
"""Tensor parameters that are a single float32."""
HIDDEN_SIZES = (256, 8, 16, 32, 64, 96, 128, 512, 1024, 2048, 4096, 8192)
PLAIN = {"eps": 1e-6, "weight_bias": 0.0, "post_eps": 1e-6, "post_weight_bias": 0.0}
"""Scalars on which no shape and no dtype depends."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Impossible(FusionError):
    """No site was found that meets all requirements; the message gives the reasons."""


def example_site(
    pattern: Pattern, strategy: Strategy | None = None, *, device: Device | None = None, world_size: int = 2
) -> Site:
    """One ordinary site of a pattern; with a strategy, one that the strategy can run.

    It starts as bfloat16 ``[4, 256]`` with the outputs that the eager function returns. It is changed only as far as
    the requirements need.

    Raises:
        Impossible: if no variant meets all requirements.
        NoSides: if a requirement's class is not registered with `sides`.
        PatternError: if the pattern has parameters for which the kit has no values; give it an ``example``.
    """
    shape, dtype = (4, 256), torch.bfloat16
    given = made_up(pattern, shape, dtype)
    inputs, attributes = {}, {}
    for name, parameter in pattern.parameters.items():
        if parameter.is_tensor:
            inputs[name] = given[name] if name in given else _tensor(pattern, parameter, shape, dtype)
        else:
            attributes[name] = given[name] if name in given else _scalar(pattern, parameter)
    device = Device("cpu") if device is None else device
    plain = Site(pattern.name, "example", inputs, {}, attributes, device, world_size)
    site = with_outputs(pattern, plain, pattern.returns)
    if strategy is None:
        return site
    return repaired(pattern, site, (*strategy.implied(pattern), *strategy.requires))


def made_up(pattern: Pattern, shape: tuple[Dim, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The parameters from the pattern's own ``example``, for x of this shape and dtype; empty without one."""
    return pattern.example(tuple(map(int, shape)), dtype) if pattern.example is not None else {}


def _tensor(pattern: Pattern, parameter: Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> TensorMeta:
    if parameter.name == "x" or parameter.name in pattern.elementwise:
        return TensorMeta(shape, dtype, strides(shape))
    if parameter.name in VECTORS:
        return TensorMeta(shape[-1:], dtype, (1,))
    if parameter.name in SCALES:
        return TensorMeta((), torch.float32, ())
    raise PatternError(
        f"pattern {pattern.name!r}: the kit cannot make up the tensor {parameter.name!r}, needs pattern(example=...)"
    )


def _scalar(pattern: Pattern, parameter: Parameter) -> Any:
    if not parameter.required:
        return parameter.default
    if parameter.name in ("eps", "post_eps"):
        return 1e-6
    raise PatternError(
        f"pattern {pattern.name!r}: the kit cannot make up the scalar {parameter.name!r}, needs pattern(example=...)"
    )


def with_outputs(pattern: Pattern, site: Site, names: Iterable[str]) -> Site:
    """The site with these live outputs, with the definition's shapes and dtypes.

    Raises:
        Impossible: if the definition does not accept the site's inputs.
    """
    given = output_metas(pattern, tuple(site.inputs.items()), tuple(site.attributes.items()))
    if isinstance(given, str):
        raise Impossible(f"{pattern.name} does not take {describe(site)}: {given}")
    return replace(site, outputs={name: given[name] for name in pattern.outputs if name in set(names)})


def output_metas(
    pattern: Pattern, inputs: tuple[tuple[str, TensorMeta], ...], attributes: tuple[tuple[str, Any], ...]
) -> Mapping[str, TensorMeta] | str:
    """The definition's outputs for such inputs, or its error as text."""
    known = ((name, PLAIN.get(name, value)) for name, value in attributes if name in pattern.parameters)
    return _output_metas(pattern, inputs, tuple(known))


@functools.lru_cache(maxsize=16384)
def _output_metas(
    pattern: Pattern, inputs: tuple[tuple[str, TensorMeta], ...], attributes: tuple[tuple[str, Any], ...]
) -> Mapping[str, TensorMeta] | str:
    # Its steps run on the meta device, in a tenth of the time of FakeTensorMode and without a process group.
    values: dict[Any, Any] = dict.fromkeys(pattern.tensors) | {name: empty(meta, "meta") for name, meta in inputs}
    values |= dict(attributes) | {GROUP: ""}
    try:
        for step in pattern.steps:
            operands = {
                name: values[operand if operand.step else operand.name] if isinstance(operand, Symbol) else operand
                for name, operand in step.operands.items()
            }
            if (alone := step.operation.alone) is not None:
                given = alone(**{name: value for name, value in operands.items() if name != GROUP})
            else:
                given = step.operation.function(**operands)
            values |= zip(step.results, given if isinstance(given, tuple) else (given,), strict=True)
    except Exception as error:  # noqa: BLE001  # a definition may refuse with any exception
        return f"{type(error).__name__}: {error}"
    return {name: TensorMeta.of(values[symbol]) for name, symbol in zip(pattern.outputs, pattern.values, strict=True)}


def fitted(pattern: Pattern, base: Site, variant: Site) -> Site:
    """A variant of ``base`` with its other tensors adapted to the change, and with the definition's outputs.

    Raises:
        Impossible: if the definition does not accept the inputs.
    """
    inputs = dict(variant.inputs)
    changed = [
        name for name, meta in inputs.items() if name not in base.inputs or meta.shape != base.inputs[name].shape
    ]
    followers = [name for name in ("x", *pattern.elementwise) if name in inputs]
    shape = inputs["x"].shape
    for name in changed:
        if name in followers:
            shape = inputs[name].shape
        elif name in VECTORS and len(inputs[name].shape) == 1:
            shape = (*shape[:-1], inputs[name].shape[0])
    inputs = _reshaped(inputs, followers, shape)
    for name, value in made_up(pattern, shape, inputs["x"].dtype).items():
        if isinstance(value, TensorMeta) and name in inputs and name not in changed:
            inputs[name] = replace(value, dtype=inputs[name].dtype)
    outputs = [name for name in variant.outputs if name in pattern.outputs]
    return with_outputs(pattern, replace(variant, inputs=inputs), outputs)


def _reshaped(inputs: Mapping[str, TensorMeta], followers: list[str], shape: tuple[Dim, ...]) -> dict[str, TensorMeta]:
    wanted = dict.fromkeys(followers, shape) | {name: shape[-1:] for name in VECTORS if name in inputs}
    return {
        name: laid_out(replace(meta, shape=wanted[name])) if wanted.get(name, meta.shape) != meta.shape else meta
        for name, meta in inputs.items()
    }


def resized(pattern: Pattern, site: Site, shape: tuple[int, ...]) -> Site:
    """The site with another shape of x.

    Raises:
        Impossible: if the definition does not accept the shape.
    """
    x = laid_out(replace(site.inputs["x"], shape=shape))
    return fitted(pattern, site, replace(site, inputs={**site.inputs, "x": x}))


def with_layout(pattern: Pattern, site: Site, layout: str) -> Site:
    """The site with x and the tensors added to it in another of `LAYOUTS`."""
    followers = ("x", *pattern.elementwise)
    inputs = {name: laid_out(meta, layout) if name in followers else meta for name, meta in site.inputs.items()}
    return with_outputs(pattern, replace(site, inputs=inputs), site.outputs)


def repaired(pattern: Pattern, site: Site, requirements: Iterable[Requirement]) -> Site:
    """The site, changed step by step until it meets every requirement.

    Raises:
        Impossible: if no step helps; the message names what is unmet.
        NoSides: if the class of an unmet requirement is not registered with `sides`.
    """
    requirements = tuple(requirements)
    while True:
        unmet = [requirement for requirement in requirements if requirement.unmet(site) is not None]
        if not unmet:
            return site
        steps = (step for requirement in unmet for step in _steps(pattern, site, requirement))
        better = next((s for s in steps if sum(r.unmet(s) is not None for r in requirements) < len(unmet)), None)
        if better is None:
            reasons = "; ".join(str(requirement.unmet(site)) for requirement in unmet)
            raise Impossible(f"at {describe(site)}: {reasons}; no variant of it meets more requirements")
        site = better


def _steps(pattern: Pattern, site: Site, requirement: Requirement) -> Iterator[Site]:
    """Consistent variants of a site that may meet a requirement, the nearest first."""
    for variant in sides(requirement, site).met:
        try:
            yield fitted(pattern, site, variant)
        except Impossible:
            rows = variant.inputs["x"].shape[:-1] if "x" in variant.inputs else ()
            yield from _other_sizes(pattern, variant, tuple(map(int, rows)))
    # an output's dtype depends on inputs and attributes
    dtyped = [name for name in pattern.scalars if name in ("norm_dtype", "residual_dtype", "sum_dtype")]
    for dtype in (None, *FLOATS):
        for name in dtyped:
            yield with_outputs(pattern, replace(site, attributes={**site.attributes, name: dtype}), site.outputs)
        if dtype is not None:
            inputs = {
                name: meta if name in SCALES else replace(meta, dtype=dtype) for name, meta in site.inputs.items()
            }
            yield with_outputs(pattern, replace(site, inputs=inputs), site.outputs)


def _other_sizes(pattern: Pattern, variant: Site, rows: tuple[int, ...]) -> Iterator[Site]:
    """The variant with each hidden size that its definition accepts."""
    for size in HIDDEN_SIZES:
        try:
            yield resized(pattern, variant, (*rows, size))
        except Impossible:
            continue


def describe(site: Site) -> str:
    """A site in one line, for messages."""
    inputs = (f"{name}={meta}{_unusual(meta)}" for name, meta in site.inputs.items())
    scalars = (f"{name}={str(value).removeprefix('torch.')}" for name, value in site.attributes.items())
    live = ", ".join(site.outputs)
    return f"{site.pattern}({', '.join((*inputs, *scalars))}) -> {live} on {site.world_size} ranks of {site.device}"


def _unusual(meta: TensorMeta) -> str:
    if meta.stride is None or tuple(meta.stride) == strides(meta.shape):
        return ""
    return f" strided {tuple(meta.stride)}"
