"""Conditions of AITER's kernels that core has no class for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fusion_aiter.kernels import PACK, Kernel
from fusion_aiter.stages import LATE_GRAPHS, MOST_PACKS, PLAIN_PACKS, WARP, one_stage_runs, stages_that_run
from fusion_core import Reason, Site

FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
"""Architecture → the only FP8 format that AITER writes there (``aiter/utility/dtypes.py``)."""

WAVEFRONT = 64
"""Threads that find the maximum of a group together, one pack each."""


@dataclass(frozen=True)
class RowFits:
    """A row fits one of the kernel's forms, in one stage or in two; see `fusion_aiter.stages`."""

    arg: str
    kernel: Kernel
    one_stage: bool

    def unmet(self, site: Site) -> Reason | None:
        """The reason if no form takes such a row."""
        tensor = site.tensor(self.arg)
        if tensor is None:
            return None
        if not tensor.shape:
            return Reason("size", f"{self.arg} has no dimension", "rows of a hidden size", self.arg)
        hidden, size = tensor.shape[-1], tensor.dtype.itemsize
        if not isinstance(hidden, int):
            found = f"{self.arg}.shape[-1] is {hidden}, which is known only at run time"
            return Reason("size", found, "a fixed hidden size", self.arg, "mark it static")
        arch, ranks = site.device.arch, site.world_size
        if any(stages_that_run(self.kernel, hidden, size, ranks, arch, one_stage=self.one_stage)):
            return None
        return self._refusal(hidden, size, ranks, arch)

    def _refusal(self, hidden: int, itemsize: int, ranks: int, arch: str) -> Reason:
        needs = self._needs(ranks, itemsize)
        if arch in LATE_GRAPHS and one_stage_runs(hidden, itemsize):
            found = f"{self.arg}.shape[-1] is {hidden}, which AITER only takes in one stage at {ranks} ranks"
            hint = "the option aiter.one_stage allows it, and CUDA graphs may be wrong then (ROCm/aiter#4888)"
            return Reason("size", found, needs, self.arg, hint)
        found = f"{self.arg}.shape[-1] is {hidden}, which AITER has no kernel for at {ranks} ranks"
        return Reason("size", found, needs, self.arg)

    def _needs(self, ranks: int, itemsize: int) -> str:
        """The sizes that two stages take, as a phrase; no model's size is in a gap between them."""
        pack = PACK // itemsize
        whole_warps = self.kernel.quantization in ("token_fp8", "group_fp8") or self.kernel.norm_out
        step = pack * math.lcm(ranks, WARP if whole_warps else 1)
        least, most = (1, MOST_PACKS) if self.kernel.quantization else PLAIN_PACKS
        return f"a multiple of {step} from {max(step, least * pack)} to {most * pack}"

    def __str__(self) -> str:
        return f"{self.arg}.shape[-1] for which there is a kernel"


@dataclass(frozen=True)
class GroupSize:
    """The elements per scale divide a row, and a wavefront can compare their packs: 8 to 512 elements."""

    arg: str

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the group has another size."""
        size, tensor = site.attributes.get("group_size"), site.tensor(self.arg)
        if size is None or tensor is None or not tensor.shape:
            return None
        pack = PACK // tensor.dtype.itemsize
        allowed = [pack << power for power in range(WAVEFRONT.bit_length())]
        if size not in allowed:
            words = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
            return Reason("attribute", f"group_size is {size}", words, "group_size")
        hidden = tensor.shape[-1]
        if isinstance(hidden, int) and hidden % size:
            return Reason("multiple_of", f"{self.arg}.shape[-1] is {hidden}", f"a multiple of {size}", self.arg)
        return None

    def __str__(self) -> str:
        return f"group_size a power of two from 8 to 512 that divides {self.arg}.shape[-1]"


@dataclass(frozen=True)
class NativeFP8:
    """Codes are in the FP8 format of the GPU, up to its largest number: float8_e4m3fnuz and 240 on gfx942."""

    def unmet(self, site: Site) -> Reason | None:
        """The reason if AITER writes other codes."""
        native = FP8.get(site.device.arch)
        if native is None:
            return Reason("arch", f"device is {site.device}", " or ".join(FP8))
        if (dtype := site.attributes.get("fp8_dtype", torch.float8_e4m3fn)) != native:
            return Reason("attribute", f"fp8_dtype is {_name(dtype)}", _name(native), "fp8_dtype")
        largest = torch.finfo(native).max
        if (given := site.attributes.get("fp8_max")) not in (None, largest):
            return Reason("attribute", f"fp8_max is {given}", f"{largest:g}", "fp8_max")
        return None

    def __str__(self) -> str:
        return "the GPU's own FP8 format, up to its largest number"


@dataclass(frozen=True)
class LeastScale:
    """The quantisation's least scale, if any, is so small that rows below it quantise to almost zero.

    AITER has no least scale. Its codes for such rows are closer to the norm; all other rows have the same codes.
    """

    most: float

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the least scale would change results."""
        given = site.attributes.get("min_scale")
        if given is None or given <= self.most:
            return None
        return Reason("attribute", f"min_scale is {given}", f"at most {self.most:.3g}", "min_scale")

    def __str__(self) -> str:
        return f"min_scale at most {self.most:.3g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
