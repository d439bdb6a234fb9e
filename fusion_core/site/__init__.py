"""A site, where a pattern matches, as explicit metadata: all that a requirement may read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusion_core.site.watched import WatchedSizes

Dim = int | torch.SymInt


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its ``torch.`` prefix."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """The metadata of a tensor.

    ``shape`` and ``stride`` contain integers, or a ``torch.SymInt`` for a size that is known only at run time. A
    requirement that reads a ``SymInt`` is evaluated again at each call, see docs/requirements.md.
    """

    shape: tuple[Dim, ...]
    dtype: torch.dtype
    stride: tuple[Dim, ...] | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorMeta:
        """The metadata of a real or fake tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()))

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Device:
    """A kind of device and its architecture: ``Device("cuda", "sm_90")``, ``Device("cpu")``.

    ROCm builds of torch call their devices ``cuda`` too; the architecture distinguishes them.

    Example:
        >>> print(Device("cuda", "gfx942"))
        cuda (gfx942)
        >>> Device.of(torch.device("cpu"))
        Device(type='cpu', arch='')
    """

    type: str
    arch: str = ""

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The device of a ``torch.device``, with its architecture read from the driver."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return cls(device.type)
        if torch.version.hip:
            return cls("cuda", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
        major, minor = torch.cuda.get_device_capability(device)
        return cls("cuda", f"sm_{major}{minor}")

    @classmethod
    def here(cls) -> Device:
        """The device on which this process would run a model: its current GPU, else the CPU."""
        return cls.of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else cls("cpu")

    def __str__(self) -> str:
        return f"{self.type} ({self.arch})" if self.arch else self.type


@dataclass(frozen=True, slots=True)
class Site:
    """One match of a pattern in a graph.

    Attributes:
        pattern: The pattern's name.
        node: A label of the site's all_reduce, for messages.
        inputs: The pattern's tensor parameters by name; absent optional ones are left out.
        outputs: The pattern's *live* outputs by name: those used outside the site.
        attributes: The pattern's scalar parameters by name: ``eps``, ``weight_bias``, ...; if the graph shows it, how
            the model rounds: ``weight_after_cast``, ``norm_of_unrounded_sum``, ``reassociated``; and ``collective`` if
            that is not torch's own all_reduce. See docs/recognition.md.
        device: The device of the tensors.
        world_size: The number of ranks in the process group.
        group: The process group's name.

    Example:
        >>> x = TensorMeta((4, 64), torch.bfloat16)
        >>> site = Site("all_reduce", "all_reduce_1", inputs={"x": x}, outputs={"reduced": x}, world_size=8)
        >>> print(site.tensor("reduced"))
        bfloat16[4, 64]
    """

    pattern: str
    node: str
    inputs: Mapping[str, TensorMeta]
    outputs: Mapping[str, TensorMeta]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    device: Device = Device("cpu")
    world_size: int = 1
    group: str = ""

    @property
    def tokens(self) -> int | None:
        """Rows of x: the product of all sizes but the last; None if one of them is known only at run time."""
        shape = self.inputs["x"].shape
        sizes = tuple(tuple.__iter__(shape))[:-1]
        if all(isinstance(size, int) for size in sizes):
            return math.prod(map(int, sizes))
        if isinstance(shape, WatchedSizes):
            shape.watch.tokens = True
        return None

    def at(self, tokens: int) -> Site:
        """The site with ``tokens`` rows: x, and all tensors with x's leading sizes, as contiguous ``[tokens, n]``."""
        lead = self.inputs["x"].shape[:-1]

        def sized(meta: TensorMeta) -> TensorMeta:
            if len(meta.shape) != len(lead) + 1 or not all(map(_same, meta.shape, lead)):
                return meta
            size = meta.shape[-1]
            return replace(meta, shape=(tokens, size), stride=None if meta.stride is None else (size, 1))

        inputs = {name: sized(meta) for name, meta in self.inputs.items()}
        return replace(self, inputs=inputs, outputs={name: sized(meta) for name, meta in self.outputs.items()})

    def bytes_of_a_token(self, name: str) -> int | None:
        """Bytes of a tensor per token, 0 if its size does not depend on the token count; None if that is unknown."""
        one, two = (self.at(tokens).tensor(name) for tokens in (1, 2))
        if one is None or two is None or not all(isinstance(size, int) for size in one.shape):
            return None
        return (math.prod(map(int, two.shape)) - math.prod(map(int, one.shape))) * one.dtype.itemsize

    def tensor(self, name: str) -> TensorMeta | None:
        """The input or live output called ``name``, or None if the site has none."""
        return self.inputs.get(name, self.outputs.get(name))


def _same(one: Dim, other: Dim) -> bool:
    """Whether two sizes are the same number or the same symbol; adds no guard."""
    if isinstance(one, int) or isinstance(other, int):
        return isinstance(one, int) and isinstance(other, int) and one == other
    return bool(one.node.expr == other.node.expr)
