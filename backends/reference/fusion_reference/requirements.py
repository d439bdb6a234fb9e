"""Conditions of this backend's strategies that core has no class for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from fusion_core import Attribute, Reason, Site

OPERATORS = ("one_shot_all_reduce_out", "two_shot_all_reduce_out", "two_shot_all_reduce_")
CUDA = (12, 3)


class TorchCollective(Attribute):
    """The place calls torch's own all_reduce, so that the definition, which does too, is as fast."""

    def __init__(self) -> None:
        super().__init__("collective", None)

    def unmet(self, site: Site) -> Reason | None:
        """Which other collective the place calls."""
        if super().unmet(site) is None:
            return None
        found = f"the place calls {site.attributes[self.name]}, which may be faster than torch's all_reduce"
        return Reason("collective", found, "a backend with a kernel of its own", "x")

    def __str__(self) -> str:
        return "torch's own all_reduce"


@dataclass(frozen=True)
class SymmetricMemory:
    """This build of torch has symmetric memory and the two kernels over it.

    ``lacking`` is what it has not, None where it has all: a part of the repr, and so of the compile-cache key. A build
    for no GPU at all meets it, since it has no GPU that an `Arch` would allow.
    """

    lacking: str | None

    @classmethod
    def here(cls) -> SymmetricMemory:
        """The requirement against the torch of this process."""
        if not torch.distributed.is_available():
            return cls("torch.distributed")
        for name in OPERATORS:
            if not hasattr(torch.ops.symm_mem, name):
                return cls(f"torch.ops.symm_mem.{name}")
        built = re.match(r"(\d+)\.(\d+)", torch.version.cuda or "")
        if built is not None and (int(built[1]), int(built[2])) < CUDA:  # there the operators only raise
            return cls(f"CUDA {CUDA[0]}.{CUDA[1]} (it is built for {torch.version.cuda})")
        return cls(None)

    def unmet(self, site: Site) -> Reason | None:
        """What this torch lacks."""
        if self.lacking is None:
            return None
        found = f"torch {torch.__version__} is without {self.lacking}"
        return Reason("symmetric_memory", found, "a build of torch with symmetric memory for the GPU")

    def __str__(self) -> str:
        return "torch's symmetric memory"


@dataclass(frozen=True)
class MostBytes:
    """A tensor has at most so many bytes; of one whose size is known only at run time, at each token count."""

    arg: str
    most: int

    def unmet(self, site: Site) -> Reason | None:
        """Why the tensor is too large."""
        tensor = site.tensor(self.arg)
        if tensor is None or not all(isinstance(size, int) for size in tensor.shape):
            return None
        size = math.prod(map(int, tensor.shape)) * tensor.dtype.itemsize
        if size <= self.most:
            return None
        return Reason("size", f"{self.arg} has {size / 2**20:.4g} MiB", f"at most {self.most / 2**20:g} MiB", self.arg)

    def changes_at(self, site: Site) -> tuple[int, ...] | None:
        """The token count from which on the tensor is too large."""
        each = site.bytes_of_a_token(self.arg)
        return (self.most // each + 1,) if each else None

    def __str__(self) -> str:
        return f"{self.arg} of at most {self.most / 2**20:g} MiB"


@dataclass(frozen=True)
class OnlyForItsBits:
    """Never met: the strategy is there for the same bits at every batch size, not for speed."""

    def unmet(self, site: Site) -> Reason | None:
        """That it is slower."""
        return Reason(
            "measured",
            "gathering every rank's part moves more bytes than torch's all_reduce",
            hint='numerics="deterministic" uses it',
        )

    def __str__(self) -> str:
        return 'numerics="deterministic"'
