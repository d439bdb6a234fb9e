"""Requirements on sizes. If a size is known only at run time, they are answered without adding a guard."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fusion_core.reason import Reason
from fusion_core.site import Dim, Site
from fusion_core.site.watched import WatchedSizes


@dataclass(frozen=True)
class MultipleOf:
    """One size of a tensor is a multiple of a number, if the site has the tensor."""

    arg: str
    dim: int
    of: int

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the size is not such a multiple, else None."""
        return _unmet_by_size(
            site, self.arg, self.dim, "multiple_of", f"a multiple of {self.of}", lambda size: size % self.of == 0
        )

    def __str__(self) -> str:
        return f"{self.arg}.shape[{self.dim}] a multiple of {self.of}"


@dataclass(frozen=True)
class SizeBetween:
    """One size of a tensor is between two bounds, both included, if the site has the tensor."""

    arg: str
    dim: int
    low: int
    high: int

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the size is out of bounds, else None."""
        return _unmet_by_size(
            site, self.arg, self.dim, "size", f"{self.low} to {self.high}",
            lambda size: self.low <= size, lambda size: size <= self.high,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.arg}.shape[{self.dim}] in {self.low} to {self.high}"


@dataclass(frozen=True)
class Contiguous:
    """A tensor is contiguous in row-major order, if the site has the tensor."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the tensor is not contiguous, else None."""
        tensor = site.tensor(self.arg)
        if tensor is None or tensor.stride is None:
            return None
        expected: Dim = 1
        # not watched: a tensor that is contiguous for any number of rows is so at each call
        shape, strides = (tuple(tuple.__iter__(sizes)) for sizes in (tensor.shape, tensor.stride))
        for size, stride in reversed(list(zip(shape, strides, strict=True))):
            known = _either(_equal(stride, expected), _equal(size, 1))
            if not known:
                found = f"{self.arg} has strides {tuple(map(str, strides))}".replace("'", "")
                return _size_reason("contiguous", self.arg, found, "a contiguous tensor", known)
            expected = expected * size
        return None

    def __str__(self) -> str:
        return f"{self.arg} contiguous"


@dataclass(frozen=True)
class FixedTokens:
    """All sizes of a tensor are known when the graph is compiled."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """The reason if a size is known only at run time, else None."""
        tensor = site.tensor(self.arg)
        if tensor is None:
            return None
        unknown = [str(size) for size in tensor.shape if not isinstance(size, int)]
        if not unknown:
            return None
        return Reason(
            "measured",
            f"{self.arg} has the run-time size {', '.join(unknown)}",
            "fixed sizes: above the kernel's capacity its operator is slower than what Inductor compiles",
            self.arg,
            "torch.compile(dynamic=False)",
        )

    def __str__(self) -> str:
        return f"fixed sizes of {self.arg}"


def _unmet_by_size(
    site: Site, arg: str, dim: int, code: str, needs: str, *conditions: Callable[[Dim], Any]
) -> Reason | None:
    """The reason if one size of a tensor does not meet every condition, else None; None too without the tensor."""
    tensor = site.tensor(arg)
    if tensor is None:
        return None
    if not -len(tensor.shape) <= dim < len(tensor.shape):
        return Reason(code, f"{arg} has {len(tensor.shape)} dimensions", f"a dimension {dim}", arg)
    size: Dim = tensor.shape[dim]
    answers = [_holds(functools.partial(condition, size), tensor.shape) for condition in conditions]
    known = False if False in answers else None if None in answers else True
    return _size_reason(code, arg, f"{arg}.shape[{dim}] is {size}", needs, known)


def _holds(condition: Callable[[], Any], sizes: tuple[Dim, ...]) -> bool | None:
    """Whether a condition on sizes holds; None if it depends on a run-time size. Never adds a guard.

    For a site that is asked ahead of a call (`plugins.asking`), it raises instead of returning None. The call then asks
    again.
    """
    if isinstance(sizes, WatchedSizes):
        return bool(condition())
    found = condition()
    return bool(found) if isinstance(found, bool) else _proven(found)


def _proven(found: torch.SymBool) -> bool | None:
    """True if a condition holds for all values of its symbols, False if for none, else None."""
    # imported here: it brings sympy, and most sizes are plain integers
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if statically_known_true(found):
        return True
    return False if statically_known_true(torch.sym_not(found)) else None


def _equal(one: Dim, other: Dim) -> bool | None:
    return _holds(lambda: one == other, ())


def _either(one: bool | None, other: bool | None) -> bool | None:
    return True if one or other else (None if None in (one, other) else False)


def _size_reason(code: str, arg: str, found: str, needs: str, known: bool | None) -> Reason | None:
    if known:
        return None
    if known is None:
        return Reason(
            code, f"{found}, which is known only at run time", needs, arg, "torch._dynamo.mark_static marks it static"
        )
    return Reason(code, found, needs, arg)
