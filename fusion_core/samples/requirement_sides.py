"""The two sides of a requirement: sites just inside and just outside its bounds, derived from its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch

from fusion_core.errors import FusionError
from fusion_core.plugins.known_faster import KnownFaster
from fusion_core.plugins.requirements import (
    Arch,
    Attribute,
    Contiguous,
    Dimensions,
    DType,
    DTypeAttribute,
    FixedTokens,
    LiveOutputs,
    MultipleOf,
    OnDevice,
    Present,
    Requirement,
    SameDType,
    SizeBetween,
    WorldSize,
)
from fusion_core.plugins.token_counts import Tokens
from fusion_core.samples.layouts import laid_out
from fusion_core.samples.variants import on_arch, tensor_of, unknown_rows, with_tensor, without
from fusion_core.site import Device, Dim, Site

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = (Device("cpu"), Device("cuda", "sm_90"), Device("cuda", "gfx942"), Device("xpu"))
FOREIGN_ARCHS = ("", "sm_89", "sm_90", "sm_100", "gfx942", "gfx1100")
OTHER_OUTPUT = "an output of another name"


class NoSides(FusionError):
    """A requirement whose class is not registered with `sides`."""


@dataclass(frozen=True)
class Sides:
    """Variants of one site, as close to a requirement's bounds as possible.

    A variant changes only what the requirement concerns, so the other tensors may no longer fit
    (`fusion_core.samples.sites.fitted` adapts them).

    Attributes:
        met: Variants that meet the requirement.
        unmet: Variants that do not; empty if every site meets it.
    """

    met: tuple[Site, ...]
    unmet: tuple[Site, ...]


@singledispatch
def sides(requirement: Requirement, site: Site) -> Sides:
    """Variants of ``site`` on both sides of ``requirement``.

    For a class of your own::

        @fusion_core.testing.sides.register
        def _(requirement: MyRequirement, site: Site) -> Sides: ...

    Raises:
        NoSides: for a requirement of a class that is not registered.
    """
    name = type(requirement).__name__
    raise NoSides(
        f"requirement {requirement} is a {type(requirement).__module__}.{name}, of which the kit does not know the two "
        f"sides; needs a function from (requirement: {name}, site: Site) to Sides(met, unmet) under "
        "@fusion_core.testing.sides.register, in the module testing of the backend's package"
    )


def _split(values: Iterable[Any], allowed: Iterable[Any], make: Callable[[Any], Site]) -> Sides:
    """Sites with the allowed values on one side, with the others on the other."""
    allowed = tuple(allowed)
    others = dict.fromkeys(value for value in values if value not in allowed)
    return Sides(tuple(map(make, allowed)), tuple(map(make, others)))


@sides.register
def _(requirement: OnDevice, site: Site) -> Sides:
    at = {kind: site.device if site.device.type == kind else Device(kind) for kind in requirement.types}
    others = [device for device in DEVICES if device.type not in at]
    return Sides(
        tuple(replace(site, device=device) for device in at.values()),
        tuple(replace(site, device=device) for device in others),
    )


@sides.register
def _(requirement: Arch, site: Site) -> Sides:
    near = [wrong for arch in requirement.archs for wrong in (f"{arch}0", f"{arch}a", arch[:-1])]
    return _split((*FOREIGN_ARCHS, *near), requirement.archs, lambda arch: on_arch(site, arch))


@sides.register
def _(requirement: WorldSize, site: Site) -> Sides:
    near = [other for size in requirement.sizes for other in (size - 1, size + 1, 2 * size) if other > 0]
    return _split((1, *near), requirement.sizes, lambda size: replace(site, world_size=size))


@sides.register
def _(requirement: DType, site: Site) -> Sides:
    arg, tensor = requirement.arg, tensor_of(site, requirement.arg)
    split = _split(DTYPES, requirement.dtypes, lambda dtype: with_tensor(site, arg, replace(tensor, dtype=dtype)))
    return _or_absent(split, site, arg)


@sides.register
def _(requirement: SameDType, site: Site) -> Sides:
    present = [name for name in requirement.args if site.tensor(name) is not None]

    def with_dtypes(dtypes: dict[str, torch.dtype]) -> Site:
        result = site
        for name, dtype in dtypes.items():
            result = with_tensor(result, name, replace(tensor_of(site, name), dtype=dtype))
        return result

    met = [with_dtypes(dict.fromkeys(present, dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    met += [without(met[0], name) for name in present[1:] if name in site.inputs or name in site.outputs]
    unmet = [
        with_dtypes({**dict.fromkeys(present, dtype), name: other})
        for name in (present if len(present) > 1 else ())
        for dtype, other in (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float16),
        )
    ]
    return Sides(tuple(met), tuple(unmet))


@sides.register
def _(requirement: MultipleOf, site: Site) -> Sides:
    of, size = requirement.of, _size(site, requirement.arg, requirement.dim)
    nearest = max(size // of, 1) * of
    met = dict.fromkeys((nearest, of, 2 * of, 3 * of))
    unmet = dict.fromkeys(other for base in met for other in (base - 1, base + 1, base + of // 2) if other % of)
    return _sized(requirement.arg, requirement.dim, met, unmet, site)


@sides.register
def _(requirement: SizeBetween, site: Site) -> Sides:
    low, high = requirement.low, requirement.high
    size = _size(site, requirement.arg, requirement.dim)
    met = dict.fromkeys(size for size in (size, low, low + 1, high - 1, high) if low <= size <= high)
    # and powers of two, which miss these bounds but no alignment
    powers = (1 << (max(low - 1, 1).bit_length() - 1), 1 << high.bit_length())
    unmet = dict.fromkeys(size for size in (low - 1, high + 1, *powers) if size >= 0 and not low <= size <= high)
    return _sized(requirement.arg, requirement.dim, met, unmet, site)


@sides.register
def _(requirement: Dimensions, site: Site) -> Sides:
    tensor = tensor_of(site, requirement.arg)

    def make(count: int) -> Site:
        shape = tensor.shape[-count:] if count else ()
        shape = (*(2 for _ in range(count - len(shape))), *shape)
        return with_tensor(site, requirement.arg, laid_out(replace(tensor, shape=shape)))

    near = [other for count in requirement.counts for other in (count - 1, count + 1) if other >= 0]
    return _or_absent(_split((*range(5), *near), requirement.counts, make), site, requirement.arg)


@sides.register
def _(requirement: Present, site: Site) -> Sides:
    arg = requirement.arg
    return Sides((with_tensor(site, arg, tensor_of(site, arg)),), (without(site, arg),))


@sides.register
def _(requirement: Contiguous, site: Site) -> Sides:
    arg = requirement.arg
    tensor = tensor_of(site, arg)
    shape = tuple(max(int(size), 2) for size in tensor.shape) or (2,)
    plain = laid_out(replace(tensor, shape=shape))
    rows = laid_out(replace(tensor, shape=(3, *shape[-1:])))
    one_row = replace(tensor, shape=(1, *shape[-1:]), stride=(7 * shape[-1] + 1, 1))  # the stride of a size 1 is unused
    met = [laid_out(tensor), plain, rows, replace(plain, stride=None), one_row]
    unmet = [laid_out(each, layout) for each in (plain, rows) for layout in ("sliced", "padded", "transposed")]
    unmet = [each for each in unmet if each.stride not in (plain.stride, rows.stride)]
    split = Sides(
        tuple(with_tensor(site, arg, each) for each in met if len(each.shape) == len(tensor.shape)),
        tuple(with_tensor(site, arg, each) for each in unmet),
    )
    return _or_absent(split, site, arg)


@sides.register
def _(requirement: LiveOutputs, site: Site) -> Sides:
    meta = next(iter(site.outputs.values()), site.inputs["x"])

    def live(*names: str) -> Site:
        return replace(site, outputs={name: site.outputs.get(name, meta) for name in names})

    met = [live(*requirement.outputs), live(), *map(live, requirement.outputs)]
    unmet = [live(OTHER_OUTPUT), live(*requirement.outputs, OTHER_OUTPUT)]
    return Sides(tuple(met), tuple(unmet))


@sides.register
def _(requirement: Attribute, site: Site) -> Sides:
    others: list[Any] = [None, "another value"]
    for value in requirement.values:
        if isinstance(value, bool):
            others.append(not value)
        elif isinstance(value, int | float):
            others += [value + 1, value - 1, value * 2]
        elif isinstance(value, torch.dtype):
            others += [*DTYPES, torch.float8_e4m3fn, torch.float8_e4m3fnuz]
    split = _split(
        others, requirement.values, lambda value: replace(site, attributes={**site.attributes, requirement.name: value})
    )
    absent = {name: value for name, value in site.attributes.items() if name != requirement.name}
    return Sides((*split.met, replace(site, attributes=absent)), split.unmet)


@sides.register
def _(requirement: DTypeAttribute, site: Site) -> Sides:
    own = tensor_of(site, requirement.arg).dtype
    absent = {name: value for name, value in site.attributes.items() if name != requirement.name}
    given = _split(
        FLOATS,
        (None, own, *requirement.others),
        lambda dtype: replace(site, attributes={**absent, requirement.name: dtype}),
    )
    return Sides((*given.met, replace(site, attributes=absent)), given.unmet)


@sides.register
def _(requirement: FixedTokens, site: Site) -> Sides:
    arg = requirement.arg
    tensor = tensor_of(site, arg)
    known = with_tensor(site, arg, laid_out(replace(tensor, shape=(4, *tensor.shape[-1:]))))
    return _or_absent(Sides((known,), (unknown_rows(site, arg),)), site, arg)


@sides.register
def _(requirement: Tokens, site: Site) -> Sides:
    of = requirement.multiple_of or 1
    least, most = max(requirement.least or 1, 1), requirement.most
    first = -(-least // of) * of
    ends = (first, first + of) if most is None else (first, most // of * of)
    near = {other for end in ends for other in (end - 1, end, end + 1, end - of, end + of) if other > 0}
    near |= {other for bound in (least, most) if bound is not None for other in (bound - 1, bound + 1) if other > 0}
    inside = {n for n in near if n % of == 0 and n >= least and (most is None or n <= most)}
    return Sides(*(tuple(_with_tokens(site, n) for n in sorted(side)) for side in (inside, near - inside)))


def _with_tokens(site: Site, tokens: int) -> Site:
    x = site.inputs["x"]
    return with_tensor(site, "x", laid_out(replace(x, shape=(tokens, *x.shape[-1:]))))


@sides.register
def _(requirement: KnownFaster, site: Site) -> Sides:
    arg = requirement.arg
    item = tensor_of(site, arg).dtype.itemsize
    machines = dict.fromkeys((arch, ranks) for arch, ranks, *_ in requirement.sizes)
    met: list[Site] = []
    unmet: list[Site] = []
    for arch, ranks in machines:
        here = replace(on_arch(site, arch), world_size=ranks)
        ranges = [(above, to) for *machine, above, to in requirement.sizes if machine == [arch, ranks]]
        ends = {end // item * item for bounds in ranges for end in bounds}
        for size in sorted({0, item} | ends | {end + item for end in ends}):
            # zero rows count as the smallest size
            inside = any(above < (size or 1) <= to for above, to in ranges)
            (met if inside else unmet).append(_of_bytes(here, arg, size))
        met.append(unknown_rows(here, arg))  # the choice is made at run time
        met += [without(here, arg)] if arg != "x" else []
    archs = dict.fromkeys((*FOREIGN_ARCHS, *(arch for arch, _ in machines)))
    counts = dict.fromkeys((1, 2, 3, *(ranks + 1 for _, ranks in machines), *(2 * ranks for _, ranks in machines)))
    others = [(arch, ranks) for arch in archs for ranks in counts if (arch, ranks) not in machines]
    unmet += [replace(on_arch(site, arch), world_size=ranks) for arch, ranks in others]
    return Sides(tuple(met), tuple(unmet))


def _of_bytes(site: Site, arg: str, size: int) -> Site:
    """The site with a tensor of ``size`` bytes, in rows of its own width if that divides the size."""
    tensor = tensor_of(site, arg)
    count, width = size // tensor.dtype.itemsize, int(tensor.shape[-1]) if tensor.shape else 1
    width = width if width and count % width == 0 else 1
    return with_tensor(site, arg, laid_out(replace(tensor, shape=(count // width, width))))


def _or_absent(split: Sides, site: Site, arg: str) -> Sides:
    """Add the site without the tensor, which meets any condition on it; x is always present."""
    return split if arg == "x" else Sides((*split.met, without(site, arg)), split.unmet)


def _size(site: Site, arg: str, dim: int) -> int:
    shape = tensor_of(site, arg).shape
    return int(shape[dim]) if -len(shape) <= dim < len(shape) else 1


def _sized(arg: str, dim: int, met: Iterable[int], unmet: Iterable[int], site: Site) -> Sides:
    """Variants with other values of one size of a tensor; one without that dimension does not meet the condition."""
    tensor = tensor_of(site, arg)
    count = dim + 1 if dim >= 0 else -dim

    def make(size: int, shape: tuple[Dim, ...] = tensor.shape) -> Site:
        sizes: list[Dim] = [*(2 for _ in range(count - len(shape))), *shape]
        sizes[dim] = size
        return with_tensor(site, arg, laid_out(replace(tensor, shape=tuple(sizes))))

    met = tuple(met)
    barely = make(met[0], (2,) * count)  # with the fewest dimensions possible
    lacking = with_tensor(site, arg, laid_out(replace(tensor, shape=(2,) * (count - 1))))
    return _or_absent(Sides((*map(make, met), barely), (*map(make, unmet), lacking)), site, arg)
