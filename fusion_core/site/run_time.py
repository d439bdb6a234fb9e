"""Sites with sizes that are known only at run time: evaluated before a call, and rebuilt at the call.

Before a call, each symbol is replaced by one of a separate environment. It has no value there, so a comparison raises:
it can neither add a guard to the graph nor use the sizes of the first call. At a call, the site is the one that a graph
of these fixed sizes would have: its sizes are computed from those of x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fusion_core._json.values import decode_scalar, encode_scalar
from fusion_core._torch.sizes import value_of
from fusion_core.site import Device, Dim, Site, TensorMeta, dtype_name
from fusion_core.site.watched import Watch, WatchedSizes


def sizes_of(site: Site) -> Iterator[Dim]:
    """All sizes and strides of a site."""
    for meta in (*site.inputs.values(), *site.outputs.values()):
        yield from meta.shape
        yield from meta.stride or ()


def has_run_time_sizes(site: Site) -> bool:
    """Whether any size or stride of a site is known only at run time."""
    return not all(isinstance(size, int) for size in sizes_of(site))


def _with_sizes(site: Site, make: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Site:
    def changed(meta: TensorMeta) -> TensorMeta:
        return replace(meta, shape=make(meta.shape), stride=None if meta.stride is None else make(meta.stride))

    return replace(
        site,
        inputs={name: changed(meta) for name, meta in site.inputs.items()},
        outputs={name: changed(meta) for name, meta in site.outputs.items()},
    )


class Ahead:
    """A site with run-time sizes, for requirements that are evaluated before a call.

    Attributes:
        lead: The symbol of x's single run-time leading size, which the token count determines. None if there are
            several or none, or if it is an expression.
        leading: All symbols in the leading sizes of x.
        unbacked: Symbols that have no value even at the first call.
    """

    def __init__(self, site: Site) -> None:
        # imported late: it imports sympy, and most sizes are plain integers
        from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

        own = ShapeEnv()
        symbols: dict[Any, Any] = {}
        self.unbacked: set[Any] = set()

        def private(size: Dim) -> Dim:
            if isinstance(size, int):
                return size
            expression = size.node.expr
            for symbol in sorted(expression.free_symbols, key=str):
                if symbol not in symbols:
                    symbols[symbol] = own.create_unbacked_symint().node.expr
            self.unbacked |= {symbols[symbol] for symbol in free_unbacked_symbols(size)}
            return own.create_symintnode(expression.xreplace(symbols), hint=None)

        self._site = _with_sizes(site, lambda sizes: tuple(map(private, sizes)))
        leading = [size for size in self._site.inputs["x"].shape[:-1] if not isinstance(size, int)]
        self.lead = leading[0].node.expr if len(leading) == 1 and leading[0].node.expr.is_symbol else None
        self.leading: set[Any] = set().union(*(size.node.expr.free_symbols for size in leading))

    def watched(self) -> tuple[Site, Watch]:
        """The site, and the record of which of its sizes are read."""
        watch = Watch()
        return _with_sizes(self._site, lambda sizes: WatchedSizes.of(sizes, watch)), watch


@functools.lru_cache(maxsize=256)
def _ahead(key: str, held: _Held) -> Ahead:
    return Ahead(held.site)


class _Held:
    """A site that is equal to any other, so that only the text passed with it is the cache key."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


def ahead(site: Site) -> Ahead:
    """The site for evaluation before a call; shared by the sites of a model's layers that are the same."""
    return _ahead(repr(replace(site, node="")), _Held(site))


def any_tokens(site: Site) -> Site:
    """The site with run-time leading sizes for x and all tensors with the same leading sizes."""
    if site.tokens is None:
        return site
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    own, lead = ShapeEnv(), site.inputs["x"].shape[:-1]
    symbols = tuple(own.create_unbacked_symint() for _ in lead)

    def freed(meta: TensorMeta) -> TensorMeta:
        like_x = len(meta.shape) == len(lead) + 1 and meta.shape[:-1] == lead
        return replace(meta, shape=(*symbols, meta.shape[-1])) if like_x else meta

    inputs = {name: freed(meta) for name, meta in site.inputs.items()}
    return replace(site, inputs=inputs, outputs={name: freed(meta) for name, meta in site.outputs.items()})


def to_data(site: Site) -> list[Any]:
    """A site as plain JSON types, the same on ranks whose graphs name their symbols differently."""
    names = {
        size.node.expr: type(size.node.expr)(f"x{place}", integer=True)
        for place, size in enumerate(site.inputs["x"].shape)
        if not isinstance(size, int) and size.node.expr.is_symbol
    }

    def said(size: Dim) -> int | str | None:
        if isinstance(size, int):
            return size
        return str(size.node.expr.xreplace(names)) if size.node.expr.free_symbols <= names.keys() else None

    def meta(tensor: TensorMeta) -> list[Any]:
        stride = None if tensor.stride is None else list(map(said, tensor.stride))
        return [dtype_name(tensor.dtype), list(map(said, tensor.shape)), stride]

    return [
        site.pattern,
        {name: meta(tensor) for name, tensor in site.inputs.items()},
        {name: meta(tensor) for name, tensor in site.outputs.items()},
        {name: encode_scalar(value) for name, value in site.attributes.items()},
        [site.device.type, site.device.arch],
        site.world_size,
    ]  # fmt: skip


def of_data(data: list[Any], shape: tuple[int, ...], group: str) -> Site:
    """The site of a call with an x of this shape.

    Args:
        data: The result of `to_data`.
        shape: The shape of x.
        group: The process group's name.
    """
    pattern, inputs, outputs, attributes, device, world_size = data

    def meta(name: str, dtype: str, sizes: list[Any], stride: list[Any] | None) -> TensorMeta:
        found = shape if name == "x" and len(sizes) == len(shape) else tuple(_size(size, shape) for size in sizes)
        strides = None if stride is None else tuple(_size(size, shape) for size in stride)
        return TensorMeta(found, getattr(torch, dtype), strides)

    return Site(
        pattern,
        "",
        {name: meta(name, *each) for name, each in inputs.items()},
        {name: meta(name, *each) for name, each in outputs.items()},
        {name: decode_scalar(value) for name, value in attributes.items()},
        Device(*device),
        world_size,
        group,
    )


def _size(text: int | str | None, shape: tuple[int, ...]) -> Dim:
    if isinstance(text, int):
        return text
    if text is None:  # it does not depend on the sizes of x, so it is unknown here
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        return ShapeEnv().create_unbacked_symint()
    return value_of(text, {f"x{place}": size for place, size in enumerate(shape)})
