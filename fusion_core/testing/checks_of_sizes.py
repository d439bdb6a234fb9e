"""Checks at the sizes that users have: large ones, those at a declared bound, and every world size."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fusion_core.samples.requirement_sides import sides
from fusion_core.samples.sites import Impossible, describe, fitted, resized
from fusion_core.samples.tensors import Values
from fusion_core.site import Site
from fusion_core.site.run_time import has_run_time_sizes
from fusion_core.testing import pools
from fusion_core.testing.check import check
from fusion_core.testing.checking import compare_each, example, here
from fusion_core.testing.subject import Subject

LARGE = ((1025, 64), (8192, 64), (3, 8192), (2, 16384))
"""Rows and hidden sizes of the large examples. If a strategy refuses a hidden size of 64, its example's is used."""
MOST = 1 << 22
"""The most elements of x for a site at a bound: beyond that the float64 oracle takes minutes."""


@check(needs_device=True)
def is_right_at_large_sizes_and_at_its_bounds(subject: Subject) -> None:
    """It is correct with many rows, with wide rows and at each bound that it declares, or refuses with reasons."""
    device, sizes = here(subject)
    plain = example(subject, device, sizes[0])
    found = {describe(site): site for site in (*_large(subject, plain), *_at_bounds(subject, plain))}
    compare_each(subject, ((site, Values(seed=2)) for site in found.values()))


@check(needs_device=True)
def is_right_at_every_world_size(subject: Subject) -> None:
    """It is correct at every world size that it accepts and this machine can run."""
    device, _ = here(subject)
    found = (example(subject, device, size) for size in pools.every_world_size(subject, device.type))
    compare_each(subject, ((site, Values(seed=3)) for site in found))


def _large(subject: Subject, plain: Site) -> Iterator[Site]:
    own = int(plain.inputs["x"].shape[-1])
    for rows, hidden in LARGE:
        for size in dict.fromkeys((hidden, own if hidden == 64 else hidden)):
            try:
                site = resized(subject.pattern, plain, (rows, size))
            except Impossible:
                continue
            if not subject.strategy.cannot(site, subject.pattern):
                yield site
                break


def _at_bounds(subject: Subject, plain: Site) -> Iterator[Site]:
    """Sites of other sizes just inside each requirement."""
    for requirement in subject.requirements:
        for variant in sides(requirement, plain).met:
            if (variant.device, variant.world_size) != (plain.device, plain.world_size) or has_run_time_sizes(variant):
                continue
            try:
                site = fitted(subject.pattern, plain, variant)
            except Impossible:
                continue
            shape = tuple(map(int, site.inputs["x"].shape))
            if shape != plain.inputs["x"].shape and math.prod(shape) <= MOST:
                yield site
