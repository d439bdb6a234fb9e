"""Sites on both sides of FlashInfer's own requirements, for the conformance kit, which imports this by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fusion_core import Device, Site
from fusion_core.testing import Sides, sides
from fusion_flashinfer.limits import MOST
from fusion_flashinfer.requirements import (
    Capability,
    KernelPresent,
    MoreRowsThanRanks,
    MulticastAllowed,
    OneCluster,
    OneLaunch,
    VectorForEachRank,
)


@sides.register
def _(requirement: KernelPresent, site: Site) -> Sides:
    return _all_or_none(requirement.installed == requirement.code, site)


@sides.register
def _(requirement: MulticastAllowed, site: Site) -> Sides:
    return _all_or_none(requirement.switched_off_by is None, site)


def _all_or_none(met: bool, site: Site) -> Sides:
    """The sides of a requirement that depends only on the machine."""
    return Sides((site,), ()) if met else Sides((), (site,))


@sides.register
def _(requirement: Capability, site: Site) -> Sides:
    least = requirement.least
    return Sides(
        tuple(_on(site, f"sm_{major}0") for major in (least, least + 2)),
        (*(_on(site, arch) for arch in (f"sm_{least - 1}0", f"sm_{least - 1}9", "gfx1200")), _on(site, "")),
    )


@sides.register
def _(requirement: OneCluster, site: Site) -> Sides:
    arg, most = requirement.arg, requirement.most
    tensor = site.inputs[arg]
    vector = 16 // tensor.dtype.itemsize
    size = tensor.shape[-1] if tensor.shape else 1
    # in vectors of 16 bytes; the blocks of one cluster share them if 8, 4 or 2 divides their number
    met = (45, most - 1, most, 2 * (most - 1), 8 * most)
    unmet = (most + 1, 2 * (most + 1), 4 * (most + 1), 8 * (most + 1))
    return Sides(
        (*(_sized(site, arg, (4, each)) for each in (size, *(vector * count for count in met))), _sized(site, arg, ())),
        tuple(_sized(site, arg, (4, vector * count)) for count in unmet),
    )


@sides.register
def _(requirement: OneLaunch, site: Site) -> Sides:
    arg = requirement.arg
    tensor = site.inputs[arg]
    hidden = int(tensor.shape[-1]) if tensor.shape else 1
    rows = MOST // (hidden * tensor.dtype.itemsize)
    met = [_sized(site, arg, (count, hidden)) for count in (1, 0, rows)]
    met += [_sized(site, arg, (MOST // tensor.dtype.itemsize,)), _unknown(site, arg)]  # checked when it runs
    unmet = [_sized(site, arg, (rows + 1, hidden)), _sized(site, arg, (MOST // tensor.dtype.itemsize + 1,))]
    return Sides(tuple(met), tuple(unmet))


@sides.register
def _(requirement: VectorForEachRank, site: Site) -> Sides:
    arg = requirement.arg
    vector = 16 // site.inputs[arg].dtype.itemsize
    met: list[Site] = []
    unmet: list[Site] = []
    for ranks in dict.fromkeys((site.world_size, 2, 4, 8)):
        here = replace(site, world_size=ranks)
        met += [_sized(here, arg, (ranks + 1, vector * count)) for count in (ranks, ranks + 1)]
        unmet += [_sized(here, arg, (ranks + 1, size)) for size in (vector * (ranks - 1), vector * ranks - 1)]
    met.append(_sized(site, arg, ()))
    return Sides(tuple(met), tuple(unmet))


@sides.register
def _(requirement: MoreRowsThanRanks, site: Site) -> Sides:
    arg, hidden = requirement.arg, site.inputs[requirement.arg].shape[-1:]
    met: list[Site] = []
    unmet: list[Site] = []
    for ranks in dict.fromkeys((site.world_size, 2, 4, 8)):  # its own first: a repaired site keeps them
        here = replace(site, world_size=ranks)
        met += [_sized(here, arg, shape) for shape in ((ranks + 1, *hidden), (2, ranks, *hidden))]
        unmet += [_sized(here, arg, shape) for shape in ((ranks, *hidden), (1, ranks, *hidden), (1, *hidden), hidden)]
    met += [_sized(site, arg, (0, *hidden)), _unknown(site, arg)]  # checked when it runs
    return Sides(tuple(met), tuple(unmet))


def _unknown(site: Site, arg: str) -> Site:
    """The site with a number of rows that is known only at run time."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it imports sympy

    tensor = site.inputs[arg]
    shape = (ShapeEnv().create_unbacked_symint(), *tensor.shape[-1:])
    return replace(site, inputs={**site.inputs, arg: replace(tensor, shape=shape, stride=None)})


def _on(site: Site, arch: str) -> Site:
    return replace(site, device=Device("cuda", arch) if arch else Device("cpu"))


def _sized(site: Site, arg: str, shape: tuple[Any, ...]) -> Site:
    """The site with a contiguous tensor of another shape."""
    strides = tuple(int(torch.Size(shape[place + 1 :]).numel()) for place in range(len(shape)))
    tensor = replace(site.inputs[arg], shape=shape, stride=strides)
    return replace(site, inputs={**site.inputs, arg: tensor})
