"""Hypothesis strategies for sites of a pattern, on both sides of a strategy's requirements, and for tensor values."""

from __future__ import annotations

import math
import typing
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from fusion_core.patterns.definition import VECTORS, Parameter, Pattern
from fusion_core.plugins.requirements import DType, LiveOutputs, Requirement
from fusion_core.plugins.strategy import Strategy
from fusion_core.samples.layouts import LAYOUTS, laid_out
from fusion_core.samples.requirement_sides import sides
from fusion_core.samples.sites import (
    FLOATS,
    SCALES,
    Impossible,
    example_site,
    fitted,
    made_up,
    repaired,
    resized,
)
from fusion_core.samples.tensors import ROWS, Values
from fusion_core.site import Device, Site, TensorMeta

HIDDEN_SIZES = (8, 64, 1, 3, 16, 20, 32, 96, 100, 128, 256)
EPSILONS = st.floats(math.log(1e-12), math.log(1e-1)).map(math.exp)
SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "eps": EPSILONS,
    "post_eps": EPSILONS,
    "weight_bias": st.sampled_from((0.0, 1.0, 0.5, -0.25)),
    "post_weight_bias": st.sampled_from((0.0, 1.0, 0.5, -0.25)),
    "norm_dtype": st.sampled_from((None, *FLOATS)),
    "post_norm_dtype": st.sampled_from((None, *FLOATS)),
    "residual_dtype": st.sampled_from((None, *FLOATS)),
    "sum_dtype": st.sampled_from((None, *FLOATS)),
    "group_size": st.sampled_from((8, 16, 32, 64, 128)),
    "fp8_dtype": st.sampled_from((torch.float8_e4m3fn, torch.float8_e4m3fnuz)),
    "fp8_max": st.sampled_from((None, 224.0)),
    "min_scale": st.sampled_from((None, 0.0)),
}
"""Values of scalar parameters by name. A parameter of a ``Literal`` type takes its values, others their default."""


@st.composite
def draw_site(
    draw: st.DrawFn,
    pattern: Pattern,
    strategy: Strategy | None = None,
    *,
    device: Device | None = None,
    world_sizes: tuple[int, ...] = (2,),
    accepted: bool | None = None,
) -> Site:
    """Sites of a pattern, each consistent with its definition.

    They vary in shape (one to four dimensions, including zero rows and odd sizes), layout, dtype per tensor, optional
    tensors, scalars and live outputs. Simple values come first, since hypothesis shrinks towards them.

    Args:
        draw: Given by hypothesis.
        pattern: The pattern.
        strategy: Most sites meet its requirements, the others just miss one; None for any site.
        device: The device of all sites.
        world_sizes: Numbers of ranks.
        accepted: True for only those sites that the strategy can run.
    """
    base = example_site(pattern, strategy, device=device, world_size=world_sizes[0])
    attributes = {name: draw(_scalar(pattern, pattern.parameters[name])) for name in pattern.scalars}
    attributes = {name: base.attributes[name] if value is ... else value for name, value in attributes.items()}
    dtype = draw(st.sampled_from(FLOATS))
    rows = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    sizes = _sizes(pattern, base, attributes)
    shape = (*rows, draw(st.sampled_from(sizes)) if sizes else int(base.inputs["x"].shape[-1]))
    inputs: dict[str, TensorMeta] = {}
    own_tensors = made_up(pattern, shape, dtype)
    for name, meta in base.inputs.items():
        if name in own_tensors:
            inputs[name] = own_tensors[name]
        elif name == "x" or name in pattern.elementwise:
            own = dtype if name == "x" else draw(st.sampled_from((dtype, torch.float32)))
            inputs[name] = laid_out(TensorMeta(shape, own), draw(st.sampled_from(LAYOUTS)))
        elif name in VECTORS:
            if not pattern.parameters[name].optional or draw(st.sampled_from((True, True, False))):
                inputs[name] = TensorMeta(shape[-1:], draw(st.sampled_from((dtype, torch.float32))), (1,))
        else:
            inputs[name] = meta
    names = draw(st.sets(st.sampled_from(pattern.outputs), min_size=1))
    world_size = draw(st.sampled_from(world_sizes))
    outputs = dict.fromkeys(names, base.inputs["x"])
    site = replace(base, inputs=inputs, outputs=outputs, attributes=attributes, world_size=world_size)
    try:
        site = fitted(pattern, site, site)
    except Impossible:
        return base
    if strategy is None:
        return site
    requirements = (*strategy.implied(pattern), *strategy.requires)
    if accepted or draw(st.sampled_from((True, True, False))):
        try:
            return repaired(pattern, site, requirements)
        except Impossible:
            return base
    if not requirements:
        return site
    missed = draw(st.sampled_from(requirements))
    variant = draw(st.sampled_from(_outside(pattern, base, missed)))
    try:
        return fitted(pattern, base, variant)
    except Impossible:
        return site  # unchanged: it may miss any number of requirements, or none


def _outside(pattern: Pattern, base: Site, requirement: Requirement) -> tuple[Site, ...]:
    """Variants of a site that miss a requirement, with only outputs of the pattern."""
    if isinstance(requirement, LiveOutputs):
        others = [name for name in pattern.outputs if name not in requirement.outputs]
        x = base.inputs["x"]
        return (*(replace(base, outputs={**base.outputs, name: x}) for name in others), base)
    unmet = sides(requirement, base).unmet
    if isinstance(requirement, DType) and requirement.arg in base.inputs:
        unmet += tuple(_all_of(base, variant.inputs[requirement.arg].dtype) for variant in unmet)
    return unmet or (base,)


def _all_of(base: Site, dtype: torch.dtype) -> Site:
    """The site with every tensor except scales in one dtype."""
    inputs = {name: meta if name in SCALES else replace(meta, dtype=dtype) for name, meta in base.inputs.items()}
    return replace(base, inputs=inputs)


def _sizes(pattern: Pattern, base: Site, attributes: dict[str, Any]) -> list[int]:
    """Hidden sizes that the definition accepts with these scalars."""
    result = []
    for size in (*HIDDEN_SIZES, int(base.inputs["x"].shape[-1])):
        try:
            resized(pattern, replace(base, attributes=attributes, outputs={}), (2, size))
        except Impossible:
            continue
        result.append(size)
    return list(dict.fromkeys(result))


def _scalar(pattern: Pattern, parameter: Parameter) -> st.SearchStrategy[Any]:
    """Values of a scalar parameter; ``...`` means the example's value."""
    if parameter.name in SCALARS:
        return SCALARS[parameter.name]
    hint = typing.get_type_hints(pattern.function)[parameter.name]
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    return st.just(...)


@st.composite
def draw_tensors(draw: st.DrawFn, site: Site, *, non_finite: bool = True) -> Values:
    """The values of a site's tensors, including adversarial rows; `build_tensors` makes the tensors.

    Args:
        draw: Given by hypothesis.
        site: The site.
        non_finite: Whether rows may contain infinities and NaN.
    """
    kinds = ROWS if non_finite else tuple(kind for kind in ROWS if kind not in ("inf", "-inf", "nan"))
    return Values(
        seed=draw(st.integers(0, 2**16)),
        rows=tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))),
        residual="residual" in site.inputs and draw(st.booleans()),
        saturating=any(name.endswith("scale") for name in site.inputs) and draw(st.booleans()),
    )
