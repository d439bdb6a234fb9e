"""Conditions as data: one object is the guard, the message, a line of the support table and a part of the cache key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fusion_core.reason import Reason
from fusion_core.site import Dim, Site, dtype_name
from fusion_core.site.watched import WatchedSizes


@runtime_checkable
class Requirement(Protocol):
    """A condition on a site.

    ``str()`` states it positively (``"x in bfloat16, float16"``); ``repr()`` tells two different ones apart, because
    it is a part of the compile-cache key. A dataclass has such a repr by itself.

    Example:
        >>> from fusion_core import TensorMeta
        >>> x = TensorMeta((4, 20), torch.bfloat16)
        >>> site = Site("all_reduce", "all_reduce", inputs={"x": x}, outputs={"reduced": x}, world_size=2)
        >>> requirement = MultipleOf("x", dim=-1, of=8)
        >>> print(requirement)
        x.shape[-1] a multiple of 8
        >>> print(requirement.unmet(site))
        x.shape[-1] is 20, needs a multiple of 8
        >>> print(WorldSize(2, 4, 8).unmet(site))
        None
    """

    def unmet(self, site: Site) -> Reason | None:
        """Why ``site`` does not meet the condition, or None where it does."""
        ...


def _or(values: tuple[Any, ...]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _holds(condition: Callable[[], Any], sizes: tuple[Dim, ...]) -> bool | None:
    """Whether a condition on sizes holds; None where it depends on one known only at run time. Never adds a guard.

    Where a site is asked ahead of a call (`plugins.asking`), it raises instead of None: the call asks again.
    """
    if isinstance(sizes, WatchedSizes):
        return bool(condition())
    found = condition()
    return bool(found) if isinstance(found, bool) else _proven(found)


def _proven(found: torch.SymBool) -> bool | None:
    """Whether a condition on symbols holds for all their values, or for none."""
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


@dataclass(frozen=True, init=False)
class OnDevice:
    """The tensors are on a device of one of these types."""

    types: tuple[str, ...]

    def __init__(self, *types: str) -> None:
        object.__setattr__(self, "types", types)

    def unmet(self, site: Site) -> Reason | None:
        """Why the site's device is of no such type."""
        if site.device.type in self.types:
            return None
        return Reason("device", f"device is {site.device}", _or(self.types))

    def __str__(self) -> str:
        return f"device {_or(self.types)}"


@dataclass(frozen=True, init=False)
class Arch:
    """The device is of one of these architectures: ``Arch("sm_90", "sm_100")``."""

    archs: tuple[str, ...]

    def __init__(self, *archs: str) -> None:
        object.__setattr__(self, "archs", archs)

    def unmet(self, site: Site) -> Reason | None:
        """Why the site's architecture is none of these."""
        if site.device.arch in self.archs:
            return None
        return Reason("arch", f"device is {site.device}", _or(self.archs))

    def __str__(self) -> str:
        return f"architecture {_or(self.archs)}"


@dataclass(frozen=True, init=False)
class WorldSize:
    """The process group has one of these numbers of ranks."""

    sizes: tuple[int, ...]

    def __init__(self, *sizes: int) -> None:
        object.__setattr__(self, "sizes", sizes)

    def unmet(self, site: Site) -> Reason | None:
        """Why the group has none of these sizes."""
        if site.world_size in self.sizes:
            return None
        return Reason("world_size", f"world size is {site.world_size}", _or(self.sizes))

    def __str__(self) -> str:
        return f"world size {_or(self.sizes)}"


@dataclass(frozen=True, init=False)
class DType:
    """A tensor, where the site has it, is of one of these dtypes."""

    arg: str
    dtypes: tuple[torch.dtype, ...]

    def __init__(self, arg: str, *dtypes: torch.dtype) -> None:
        object.__setattr__(self, "arg", arg)
        object.__setattr__(self, "dtypes", dtypes)

    def unmet(self, site: Site) -> Reason | None:
        """Why the tensor is of none of these dtypes."""
        tensor = site.tensor(self.arg)
        if tensor is None or tensor.dtype in self.dtypes:
            return None
        return Reason("dtype", f"{self.arg} is {dtype_name(tensor.dtype)}", self._names(), self.arg)

    def _names(self) -> str:
        return _or(tuple(map(dtype_name, self.dtypes)))

    def __str__(self) -> str:
        return f"{self.arg} in {self._names()}"


@dataclass(frozen=True, init=False)
class SameDType:
    """Those of the named tensors that the site has are of one dtype, that of the first."""

    args: tuple[str, ...]

    def __init__(self, *args: str) -> None:
        object.__setattr__(self, "args", args)

    def unmet(self, site: Site) -> Reason | None:
        """Which tensor has another dtype than the first."""
        present = [(name, tensor) for name in self.args if (tensor := site.tensor(name)) is not None]
        for name, tensor in present[1:]:
            first_name, first = present[0]
            if tensor.dtype != first.dtype:
                needs = f"{dtype_name(first.dtype)}, the dtype of {first_name}"
                return Reason("same_dtype", f"{name} is {dtype_name(tensor.dtype)}", needs, name)
        return None

    def __str__(self) -> str:
        return f"one dtype for {', '.join(self.args)}"


@dataclass(frozen=True)
class MultipleOf:
    """One size of a tensor, where the site has it, is a multiple of a number."""

    arg: str
    dim: int
    of: int

    def unmet(self, site: Site) -> Reason | None:
        """Why the size is no such multiple."""
        tensor = site.tensor(self.arg)
        if tensor is None:
            return None
        if not -len(tensor.shape) <= self.dim < len(tensor.shape):
            found = f"{self.arg} has {len(tensor.shape)} dimensions"
            return Reason("multiple_of", found, f"a dimension {self.dim}", self.arg)
        size: Dim = tensor.shape[self.dim]
        found = f"{self.arg}.shape[{self.dim}] is {size}"
        known = _holds(lambda: size % self.of == 0, tensor.shape)
        return _size_reason("multiple_of", self.arg, found, f"a multiple of {self.of}", known)

    def __str__(self) -> str:
        return f"{self.arg}.shape[{self.dim}] a multiple of {self.of}"


@dataclass(frozen=True)
class SizeBetween:
    """One size of a tensor, where the site has it, lies between two bounds, both included."""

    arg: str
    dim: int
    low: int
    high: int

    def unmet(self, site: Site) -> Reason | None:
        """Why the size lies outside."""
        tensor = site.tensor(self.arg)
        if tensor is None:
            return None
        if not -len(tensor.shape) <= self.dim < len(tensor.shape):
            found = f"{self.arg} has {len(tensor.shape)} dimensions"
            return Reason("size", found, f"a dimension {self.dim}", self.arg)
        size: Dim = tensor.shape[self.dim]
        known = _holds(lambda: self.low <= size, tensor.shape) and _holds(lambda: size <= self.high, tensor.shape)
        found = f"{self.arg}.shape[{self.dim}] is {size}"
        return _size_reason("size", self.arg, found, f"{self.low} to {self.high}", known)

    def __str__(self) -> str:
        return f"{self.arg}.shape[{self.dim}] in {self.low} to {self.high}"


@dataclass(frozen=True, init=False)
class Dimensions:
    """A tensor, where the site has it, has one of these numbers of dimensions."""

    arg: str
    counts: tuple[int, ...]

    def __init__(self, arg: str, *counts: int) -> None:
        object.__setattr__(self, "arg", arg)
        object.__setattr__(self, "counts", counts)

    def unmet(self, site: Site) -> Reason | None:
        """Why the tensor has another number of dimensions."""
        tensor = site.tensor(self.arg)
        if tensor is None or len(tensor.shape) in self.counts:
            return None
        return Reason("dimensions", f"{self.arg} has {len(tensor.shape)} dimensions", _or(self.counts), self.arg)

    def __str__(self) -> str:
        return f"{self.arg} with {_or(self.counts)} dimensions"


@dataclass(frozen=True)
class Present:
    """The site has this tensor: a norm with a weight, where the pattern allows one without."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """Why the tensor is missing."""
        if site.tensor(self.arg) is not None:
            return None
        return Reason("present", f"there is no {self.arg}", "one", self.arg)

    def __str__(self) -> str:
        return f"{self.arg} present"


@dataclass(frozen=True)
class Contiguous:
    """A tensor, where the site has it, is contiguous in row-major order."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """Why the tensor is not contiguous."""
        tensor = site.tensor(self.arg)
        if tensor is None or tensor.stride is None:
            return None
        expected: Dim = 1
        # not watched: what is contiguous for any number of rows is so at each call
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


@dataclass(frozen=True, init=False)
class LiveOutputs:
    """No other outputs than these are used outside the site."""

    outputs: tuple[str, ...]

    def __init__(self, *outputs: str) -> None:
        object.__setattr__(self, "outputs", outputs)

    def unmet(self, site: Site) -> Reason | None:
        """Which live output is none of these."""
        for name in site.outputs:
            if name not in self.outputs:
                needs = f"no other live outputs than {_or(self.outputs)}" if self.outputs else "no live outputs"
                return Reason("live_outputs", f"{name} is used outside the site", needs, name)
        return None

    def __str__(self) -> str:
        return f"live outputs among {', '.join(self.outputs)}"


@dataclass(frozen=True, init=False)
class Attribute:
    """A scalar of the site has one of these values: ``Attribute("weight_bias", 0.0, 1.0)``."""

    name: str
    values: tuple[Any, ...]

    def __init__(self, name: str, *values: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)

    def unmet(self, site: Site) -> Reason | None:
        """Why the attribute has none of these values."""
        if self.name not in site.attributes or site.attributes[self.name] in self.values:
            return None
        found = f"{self.name} is {_value(site.attributes[self.name])}"
        return Reason("attribute", found, _or(tuple(map(_value, self.values))), self.name)

    def __str__(self) -> str:
        return f"{self.name} {_or(tuple(map(_value, self.values)))}"


@dataclass(frozen=True)
class DTypeAttribute:
    """An attribute that names a dtype is None, a tensor's own dtype or one of some others."""

    name: str
    arg: str
    others: tuple[torch.dtype, ...] = ()

    def unmet(self, site: Site) -> Reason | None:
        """Why the attribute is another dtype."""
        value, tensor = site.attributes.get(self.name), site.tensor(self.arg)
        if value is None or tensor is None or value in (tensor.dtype, *self.others):
            return None
        names = " or ".join(dict.fromkeys(map(dtype_name, (tensor.dtype, *self.others))))
        return Reason("attribute", f"{self.name} is {dtype_name(value)}", names, self.name)

    def __str__(self) -> str:
        return " or ".join([f"{self.name} that of {self.arg}", *map(dtype_name, self.others)])


@dataclass(frozen=True)
class FixedTokens:
    """All sizes of a tensor are known when the graph is compiled."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """Which size is not."""
        tensor = site.tensor(self.arg)
        if tensor is None:
            return None
        unknown = [str(size) for size in tensor.shape if not isinstance(size, int)]
        if not unknown:
            return None
        return Reason(
            "measured",
            f"{self.arg} has the run-time size {', '.join(unknown)}",
            "fixed sizes: where it gets too large for the kernel, this quantisation takes several others",
            self.arg,
            "torch.compile(dynamic=False)",
        )

    def __str__(self) -> str:
        return f"fixed sizes of {self.arg}"


def _value(value: Any) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
