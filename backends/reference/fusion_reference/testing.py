"""Sites on both sides of this backend's own requirements, for the conformance kit, which imports this by itself."""

from __future__ import annotations

from dataclasses import replace

from fusion_core import Site
from fusion_core.testing import Sides, sides
from fusion_reference.requirements import MostBytes, OnlyForItsBits, SymmetricMemory


@sides.register
def _(requirement: SymmetricMemory, site: Site) -> Sides:
    return Sides((site,), ()) if requirement.lacking is None else Sides((), (site,))


@sides.register
def _(requirement: OnlyForItsBits, site: Site) -> Sides:
    return Sides((), (site,))


@sides.register
def _(requirement: MostBytes, site: Site) -> Sides:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it imports sympy

    arg, most = requirement.arg, requirement.most
    tensor = site.inputs[arg]
    size = int(tensor.shape[-1]) if tensor.shape else 1
    rows = most // (size * tensor.dtype.itemsize)
    unknown = replace(tensor, shape=(ShapeEnv().create_unbacked_symint(), size), stride=None)
    met = [_sized(site, arg, shape) for shape in ((4, size), (0, size), (rows, size))]
    return Sides(
        (*met, replace(site, inputs={**site.inputs, arg: unknown})),
        (_sized(site, arg, (rows + 1, size)), _sized(site, arg, (2, rows, size))),
    )


def _sized(site: Site, arg: str, shape: tuple[int, ...]) -> Site:
    """The site with a contiguous tensor of another shape."""
    strides = [1]
    for each in reversed(shape[1:]):
        strides.insert(0, strides[0] * each)
    tensor = replace(site.inputs[arg], shape=shape, stride=tuple(strides))
    return replace(site, inputs={**site.inputs, arg: tensor})
