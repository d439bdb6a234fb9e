"""Conditions of FlashInfer's kernels that core has no class for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusion_core import Reason, Site
from fusion_flashinfer.availability import capability, multicast_off, pattern_codes
from fusion_flashinfer.limits import MOST

MOST_THREADS = 1024
FEWER_THREADS = 512
"""Threads of the two-shot kernel that writes the norm and its per-group FP8: with 1024 it needs more registers than a
block has ("too many resources requested for launch": FlashInfer 0.7.2.post1, H200, hidden 65536)."""


@dataclass(frozen=True)
class KernelPresent:
    """The installed FlashInfer has this fused pattern, under this code.

    ``installed`` is its code there, None if it is missing. It is part of the repr and so of the compile-cache key.
    """

    name: str
    code: int
    installed: int | None

    @classmethod
    def here(cls, name: str, code: int) -> KernelPresent:
        """The requirement on the installed FlashInfer. Met if there is none: `availability` refuses that."""
        codes = pattern_codes()
        return cls(name, code, code if codes is None else codes.get(name))

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the installed FlashInfer lacks it or has another code."""
        if self.installed == self.code:
            return None
        found = f"the installed FlashInfer has {self.name} as {self.installed}"
        if self.installed is None:
            found = f"the installed FlashInfer has no {self.name}"
        return Reason("kernel", found, f"{self.name} = {self.code}, as flashinfer-python 0.7.2 has it")

    def __str__(self) -> str:
        return f"FlashInfer's {self.name}"


@dataclass(frozen=True)
class MulticastAllowed:
    """The environment does not switch off NVLink multicast, which FlashInfer's mnnvl kernels use.

    ``switched_off_by`` is the setting that does, or None. It is part of the repr and so of the compile-cache key.
    """

    switched_off_by: str | None

    @classmethod
    def here(cls) -> MulticastAllowed:
        """The requirement on this process's environment."""
        return cls(multicast_off())

    def unmet(self, site: Site) -> Reason | None:
        """The reason if a setting switches it off."""
        if self.switched_off_by is None:
            return None
        return Reason("multicast", f"{self.switched_off_by} switches NVLink multicast off", "it on")

    def __str__(self) -> str:
        return "NVLink multicast not switched off"


@dataclass(frozen=True)
class Capability:
    """The GPU's major compute capability is at least this."""

    least: int

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the GPU is too old."""
        if capability(site.device) >= self.least:
            return None
        return Reason("arch", f"device is {site.device}", f"compute capability {self.least} or later")

    def __str__(self) -> str:
        return f"compute capability {self.least} or later"


@dataclass(frozen=True)
class OneCluster:
    """A row fits one thread block cluster: ``v / gcd(v, 8) <= most`` with ``v`` 16-byte vectors per row.

    Source: the launch arithmetic of ``trtllm_allreduce_fusion.cuh``, which fails with "block_size > 1024" otherwise.
    """

    arg: str
    most: int = MOST_THREADS

    def unmet(self, site: Site) -> Reason | None:
        """The reason if a row does not fit."""
        tensor = site.tensor(self.arg)
        if tensor is None or not tensor.shape:
            return None
        size = tensor.shape[-1]
        if not isinstance(size, int):
            return Reason(
                "size",
                f"{self.arg}.shape[-1] is {size}, which is known only at run time",
                "a fixed hidden size",
                self.arg,
                "mark it static",
            )
        vectors = size * tensor.dtype.itemsize // 16
        threads = vectors // math.gcd(vectors, 8)
        if threads <= self.most:
            return None
        found = f"{self.arg}.shape[-1] is {size}, which takes {threads} threads to a block"
        return Reason("size", found, f"at most {self.most}", self.arg)

    def __str__(self) -> str:
        return f"{self.arg}.shape[-1] in one cluster of blocks of {self.most} threads"


@dataclass(frozen=True)
class OneLaunch:
    """The input fits one launch: for kernels whose scales cannot be written in parts."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the input is too large."""
        tensor = site.tensor(self.arg)
        if tensor is None or not all(isinstance(size, int) for size in tensor.shape):
            return None
        size = math.prod(map(int, tensor.shape)) * tensor.dtype.itemsize
        if size <= MOST:
            return None
        return Reason("size", f"{self.arg} has {size / 2**20:.4g} MiB", f"at most {MOST >> 20} MiB", self.arg)

    def changes_at(self, site: Site) -> tuple[int, ...] | None:
        """The token count from which on the input is too large."""
        each = site.bytes_of_a_token(self.arg)
        return (MOST // each + 1,) if each else None

    def __str__(self) -> str:
        return f"{self.arg} of at most {MOST >> 20} MiB"


@dataclass(frozen=True)
class VectorForEachRank:
    """A row has a 16-byte vector for each rank: in a two-shot kernel, one thread per rank waits for that rank.

    Source: the launch arithmetic of ``trtllm_allreduce_fusion.cuh``, which gives a short row one thread per vector and
    fails with "not oneshot, or block_size < nranks" otherwise.
    """

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """The reason if a row is too short."""
        tensor = site.tensor(self.arg)
        if tensor is None or not tensor.shape:
            return None
        size = tensor.shape[-1]
        if not isinstance(size, int) or size * tensor.dtype.itemsize >= 16 * site.world_size:
            return None
        found = f"{self.arg}.shape[-1] is {size}"
        return Reason("size", found, f"16 bytes for each of the {site.world_size} ranks", self.arg)

    def __str__(self) -> str:
        return f"16 bytes of {self.arg}.shape[-1] for each rank"


@dataclass(frozen=True)
class MoreRowsThanRanks:
    """More rows than ranks: FlashInfer's two-shot kernels assert it (``trtllm_ar.py``)."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """The reason if there are too few rows."""
        tensor = site.tensor(self.arg)
        if tensor is None or not all(isinstance(size, int) for size in tensor.shape):
            return None
        rows = math.prod(map(int, tensor.shape[:-1]))
        if rows > site.world_size or rows == 0:
            return None
        return Reason("size", f"{self.arg} has {rows} rows", f"more than the {site.world_size} ranks", self.arg)

    def changes_at(self, site: Site) -> tuple[int, ...] | None:
        """The token count from which on there are enough rows."""
        return (site.world_size + 1,) if site.bytes_of_a_token(self.arg) else None

    def __str__(self) -> str:
        return f"more rows of {self.arg} than ranks"
