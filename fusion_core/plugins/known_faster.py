"""The condition that a strategy was measured to be faster, for machines without a tuning table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusion_core.reason import TUNE, Reason
from fusion_core.site import Site


@dataclass(frozen=True)
class KnownFaster:
    """The strategy was measured to be faster than the unfused path on this kind of machine, at this input size.

    For `Strategy.worthwhile`. A table of ``fusion-core tune`` that has the strategy takes precedence. A size that is
    known only at run time meets the condition: the choice is made then.

    Attributes:
        arg: The input whose size counts.
        sizes: Architecture, number of ranks, and the bytes of the input above which and up to which it was faster.
            Empty if it has not been measured.
        source: Who measured it, as a phrase that follows the sizes.

    Example:
        >>> from fusion_core import Device, TensorMeta
        >>> x = TensorMeta((4096, 8192), __import__("torch").bfloat16)
        >>> site = Site("all_reduce", "all_reduce", {"x": x}, {"reduced": x}, {}, Device("cuda", "sm_90"), 4)
        >>> print(KnownFaster("x", (("sm_90", 4, 0, 8 << 20),)).unmet(site))
        x has 64 MiB on 4 ranks of cuda (sm_90), needs over 0 up to 8 MiB; fusion-core tune measures it on this machine
    """

    arg: str
    sizes: tuple[tuple[str, int, int, int], ...] = ()
    source: str | None = None

    def unmet(self, site: Site) -> Reason | None:
        """The reason if it is not known to be faster, else None."""
        here = f"{site.world_size} ranks of {site.device}"
        ranges = [(above, to) for arch, ranks, above, to in self.sizes if (arch, ranks) == _machine(site)]
        if not ranges:
            return Reason("measured", f"nobody has measured it to be faster on {here}", "a measurement", hint=TUNE)
        tensor = site.tensor(self.arg)
        if tensor is None or not all(isinstance(size, int) for size in tensor.shape):
            return None
        size = math.prod(map(int, tensor.shape)) * tensor.dtype.itemsize
        if any(above < max(size, 1) <= to for above, to in ranges):
            return None
        words = " or ".join(f"over {above / 2**20:g} up to {to / 2**20:g} MiB" for above, to in ranges)
        found = f"{self.arg} has {size / 2**20:.3g} MiB on {here}"
        return Reason("measured", found, words + (f", {self.source}" if self.source else ""), hint=TUNE)

    def changes_at(self, site: Site) -> tuple[int, ...] | None:
        """Token counts at which the answer may change."""
        each = site.bytes_of_a_token(self.arg)
        if not each:
            return None
        ends = {end for arch, ranks, *ends in self.sizes if (arch, ranks) == _machine(site) for end in ends}
        return tuple(sorted(end // each + 1 for end in ends))

    def __str__(self) -> str:
        return f"an input size of {self.arg} at which it is known to be faster"


def _machine(site: Site) -> tuple[str, int]:
    return site.device.arch, site.world_size
