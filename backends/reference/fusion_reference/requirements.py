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
    """The site calls torch's own all_reduce, as the definition does: the definition is then as fast."""

    def __init__(self) -> None:
        super().__init__("collective", None)

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the site calls another collective."""
        if super().unmet(site) is None:
            return None
        found = f"the place calls {site.attributes[self.name]}, which may be faster than torch's all_reduce"
        return Reason("collective", found, "a backend with a kernel of its own", "x")

    def __str__(self) -> str:
        return "torch's own all_reduce"


@dataclass(frozen=True)
class SymmetricMemory:
    """This build of torch has symmetric memory and the two kernels over it.

    ``lacking`` names what is missing, or is None. It is part of the repr and so of the compile-cache key. CPU-only
    builds pass; `Arch` rejects them.
    """

    lacking: str | None

    @classmethod
    def here(cls) -> SymmetricMemory:
        """The requirement on this process's torch."""
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
        """The reason if this torch lacks something."""
        if self.lacking is None:
            return None
        found = f"torch {torch.__version__} is without {self.lacking}"
        return Reason("symmetric_memory", found, "a build of torch with symmetric memory for the GPU")

    def __str__(self) -> str:
        return "torch's symmetric memory"


@dataclass(frozen=True)
class MostBytes:
    """A tensor has at most this many bytes. If its size is known only at run time, each token count is checked."""

    arg: str
    most: int

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the tensor is too large."""
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
    """Never met: the strategy exists for the same bits at every batch size, not for speed."""

    def unmet(self, site: Site) -> Reason | None:
        """The reason: it is slower."""
        return Reason(
            "measured",
            "gathering every rank's part moves more bytes than torch's all_reduce",
            hint='numerics="deterministic" uses it',
        )

    def __str__(self) -> str:
        return 'numerics="deterministic"'
