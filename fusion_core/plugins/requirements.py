"""Conditions as data: one object is the guard, the message, a line of the support table and a part of the cache key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fusion_core.plugins.size_requirements import Contiguous, FixedTokens, MultipleOf, SizeBetween
from fusion_core.reason import Reason
from fusion_core.site import Site, dtype_name

__all__ = [
    "Arch",
    "Attribute",
    "Contiguous",
    "DType",
    "DTypeAttribute",
    "Dimensions",
    "FixedTokens",
    "LiveOutputs",
    "MultipleOf",
    "OnDevice",
    "Present",
    "Requirement",
    "SameDType",
    "SizeBetween",
    "WorldSize",
]


@runtime_checkable
class Requirement(Protocol):
    """A condition on a site.

    ``str()`` states it positively (``"x in bfloat16, float16"``). ``repr()`` must differ between different conditions,
    because it is part of the compile-cache key. A dataclass has such a ``repr()`` by default.

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
        """The reason why ``site`` does not meet the condition, or None if it does."""
        ...


def _or(values: tuple[Any, ...]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


@dataclass(frozen=True, init=False)
class OnDevice:
    """The tensors are on a device of one of these types."""

    types: tuple[str, ...]

    def __init__(self, *types: str) -> None:
        object.__setattr__(self, "types", types)

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the site's device has another type, else None."""
        if site.device.type in self.types:
            return None
        return Reason("device", f"device is {site.device}", _or(self.types))

    def __str__(self) -> str:
        return f"device {_or(self.types)}"


@dataclass(frozen=True, init=False)
class Arch:
    """The device has one of these architectures: ``Arch("sm_90", "sm_100")``."""

    archs: tuple[str, ...]

    def __init__(self, *archs: str) -> None:
        object.__setattr__(self, "archs", archs)

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the site's device has another architecture, else None."""
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
        """The reason if the group has another size, else None."""
        if site.world_size in self.sizes:
            return None
        return Reason("world_size", f"world size is {site.world_size}", _or(self.sizes))

    def __str__(self) -> str:
        return f"world size {_or(self.sizes)}"


@dataclass(frozen=True, init=False)
class DType:
    """A tensor has one of these dtypes, if the site has the tensor."""

    arg: str
    dtypes: tuple[torch.dtype, ...]

    def __init__(self, arg: str, *dtypes: torch.dtype) -> None:
        object.__setattr__(self, "arg", arg)
        object.__setattr__(self, "dtypes", dtypes)

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the tensor has another dtype, else None."""
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
    """All of the named tensors that the site has are of one dtype, that of the first."""

    args: tuple[str, ...]

    def __init__(self, *args: str) -> None:
        object.__setattr__(self, "args", args)

    def unmet(self, site: Site) -> Reason | None:
        """The reason if a tensor has another dtype than the first, else None."""
        present = [(name, tensor) for name in self.args if (tensor := site.tensor(name)) is not None]
        for name, tensor in present[1:]:
            first_name, first = present[0]
            if tensor.dtype != first.dtype:
                needs = f"{dtype_name(first.dtype)}, the dtype of {first_name}"
                return Reason("same_dtype", f"{name} is {dtype_name(tensor.dtype)}", needs, name)
        return None

    def __str__(self) -> str:
        return f"one dtype for {', '.join(self.args)}"


@dataclass(frozen=True, init=False)
class Dimensions:
    """A tensor has one of these numbers of dimensions, if the site has the tensor."""

    arg: str
    counts: tuple[int, ...]

    def __init__(self, arg: str, *counts: int) -> None:
        object.__setattr__(self, "arg", arg)
        object.__setattr__(self, "counts", counts)

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the tensor has another number of dimensions, else None."""
        tensor = site.tensor(self.arg)
        if tensor is None or len(tensor.shape) in self.counts:
            return None
        return Reason("dimensions", f"{self.arg} has {len(tensor.shape)} dimensions", _or(self.counts), self.arg)

    def __str__(self) -> str:
        return f"{self.arg} with {_or(self.counts)} dimensions"


@dataclass(frozen=True)
class Present:
    """The site has this tensor, which its pattern allows to be missing, e.g. the weight of a norm."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the tensor is missing, else None."""
        if site.tensor(self.arg) is not None:
            return None
        return Reason("present", f"there is no {self.arg}", "one", self.arg)

    def __str__(self) -> str:
        return f"{self.arg} present"


@dataclass(frozen=True, init=False)
class LiveOutputs:
    """Only these outputs are used outside the site."""

    outputs: tuple[str, ...]

    def __init__(self, *outputs: str) -> None:
        object.__setattr__(self, "outputs", outputs)

    def unmet(self, site: Site) -> Reason | None:
        """The reason if another output is live, else None."""
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
        """The reason if the attribute has another value, else None."""
        if self.name not in site.attributes or site.attributes[self.name] in self.values:
            return None
        found = f"{self.name} is {_value(site.attributes[self.name])}"
        return Reason("attribute", found, _or(tuple(map(_value, self.values))), self.name)

    def __str__(self) -> str:
        return f"{self.name} {_or(tuple(map(_value, self.values)))}"


@dataclass(frozen=True)
class DTypeAttribute:
    """An attribute that names a dtype is None, the dtype of a tensor, or one of ``others``."""

    name: str
    arg: str
    others: tuple[torch.dtype, ...] = ()

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the attribute is another dtype, else None."""
        value, tensor = site.attributes.get(self.name), site.tensor(self.arg)
        if value is None or tensor is None or value in (tensor.dtype, *self.others):
            return None
        names = " or ".join(dict.fromkeys(map(dtype_name, (tensor.dtype, *self.others))))
        return Reason("attribute", f"{self.name} is {dtype_name(value)}", names, self.name)

    def __str__(self) -> str:
        return " or ".join([f"{self.name} that of {self.arg}", *map(dtype_name, self.others)])


def _value(value: Any) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
