"""Sites on both sides of AITER's own requirements, for the conformance kit, which imports this module by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from fusion_aiter.requirements import FP8, GroupSize, LeastScale, NativeFP8, RowFits
from fusion_aiter.stages import MOST_PACKS, PLAIN_PACKS, stages_that_run
from fusion_core import Device, Site
from fusion_core.testing import Sides, sides


@sides.register
def _(requirement: RowFits, site: Site) -> Sides:
    kernel, arg = requirement.kernel, requirement.arg
    size = site.inputs[arg].dtype.itemsize
    pack = 16 // size
    packs = (1, 2, 3, 31, 32, 33, 64, 96, 128, *PLAIN_PACKS, MOST_PACKS)
    near = sorted({count + by for count in packs for by in (-1, 0, 1) if count + by > 0} | {360, 1040, 4096})
    met: list[Site] = []
    unmet: list[Site] = []
    for arch in ("gfx942", "gfx950"):
        here = _on(site, arch)
        for hidden in (*(pack * count for count in near), pack * 8 + pack // 2):
            one, two = stages_that_run(kernel, hidden, size, site.world_size, arch, one_stage=requirement.one_stage)
            (met if one or two else unmet).append(_sized(here, arg, (4, hidden)))
    unmet.append(_sized(site, arg, ()))
    return Sides(tuple(met), tuple(unmet))


@sides.register
def _(requirement: GroupSize, site: Site) -> Sides:
    hidden = int(site.inputs[requirement.arg].shape[-1])
    pack = 16 // site.inputs[requirement.arg].dtype.itemsize
    allowed = [pack << power for power in range(7)]
    met = [size for size in allowed if hidden % size == 0]
    unmet = [*(size for size in allowed if hidden % size), pack // 2, pack - 1, 3 * pack, pack << 7, hidden + 1, 0]
    return _given(site, "group_size", (*met, None), (size for size in unmet if size not in met))


@sides.register
def _(requirement: NativeFP8, site: Site) -> Sides:
    met, unmet = [], []
    for arch, native in FP8.items():
        here = _on(site, arch)
        other = next(dtype for dtype in FP8.values() if dtype != native)
        largest = torch.finfo(native).max
        for dtype, most in ((native, None), (native, largest)):
            met.append(replace(here, attributes={**site.attributes, "fp8_dtype": dtype, "fp8_max": most}))
        for dtype, most in ((other, None), (native, 224.0), (native, largest / 2)):
            unmet.append(replace(here, attributes={**site.attributes, "fp8_dtype": dtype, "fp8_max": most}))
    unmet += [replace(site, device=Device("cuda", arch)) for arch in ("gfx90a", "sm_90")]
    return Sides(tuple(met), tuple(unmet))


@sides.register
def _(requirement: LeastScale, site: Site) -> Sides:
    most = requirement.most
    return _given(site, "min_scale", (None, 0.0, most / 2, most), (most * 1.001, 2 * most, 1e-3))


def _given(site: Site, name: str, met: Iterable[Any], unmet: Iterable[Any]) -> Sides:
    def made(values: Iterable[Any]) -> tuple[Site, ...]:
        return tuple(replace(site, attributes={**site.attributes, name: value}) for value in values)

    return Sides(made(met), made(unmet))


def _on(site: Site, arch: str) -> Site:
    """The site on another GPU; a CPU with an architecture stays a CPU."""
    return replace(site, device=Device(site.device.type if site.device.arch else "cuda", arch))


def _sized(site: Site, arg: str, shape: tuple[Any, ...]) -> Site:
    """The site with a contiguous tensor of another shape."""
    strides = tuple(int(torch.Size(shape[place + 1 :]).numel()) for place in range(len(shape)))
    tensor = replace(site.inputs[arg], shape=shape, stride=strides)
    return replace(site, inputs={**site.inputs, arg: tensor})
