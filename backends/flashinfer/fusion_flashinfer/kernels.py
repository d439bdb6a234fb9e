"""FlashInfer's fused kernels: the pattern that each one runs, and its outputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_core import Pattern
from fusion_core.patterns import CORE_PATTERNS

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Kernel:
    """One of ``AllReduceFusionPattern`` as one operator. A pattern without a residual passes zeros.

    Attributes:
        pattern: The pattern's name.
        code: FlashInfer's code.
        symbol: FlashInfer's name.
        quantization: ``""``, ``"static_fp8"``, ``"token_fp8"``, ``"group_fp8"`` or ``"nvfp4"``.
        norm_out: Whether it returns the norm next to its quantisation.
    """

    pattern: str
    code: int
    symbol: str
    quantization: str = ""
    norm_out: bool = False

    @property
    def name(self) -> str:
        """The operator's name, and the strategy's after ``flashinfer.``."""
        return f"{self.pattern}_out" if self.norm_out else self.pattern

    @functools.cached_property
    def adds(self) -> bool:
        """Whether it takes a residual."""
        return "_add_" in self.pattern

    @functools.cached_property
    def norms(self) -> bool:
        """Whether it computes more than the sum."""
        return self.pattern != "all_reduce"

    @functools.cached_property
    def option(self) -> tuple[str, ...]:
        """The names of its quantisation's own scalars."""
        return {"group_fp8": ("group_size",), "nvfp4": ("scale_layout",)}.get(self.quantization, ())

    @functools.cached_property
    def definition(self) -> Pattern:
        """The pattern."""
        return next(each for each in CORE_PATTERNS if each.name == self.pattern)

    @functools.cached_property
    def forms(self) -> dict[tuple[bool | None, bool, bool], Form]:
        """Its forms, by whether they are one-shot, use PDL and are mnnvl's."""
        every = itertools.product((True, False, None), (False, True), (False, True))
        return {each: Form(self, *each) for each in every}

    @functools.cached_property
    def strategies(self) -> dict[tuple[bool, bool, bool], str]:
        """The names of its strategies, by whether they are two-shot, use PDL and are mnnvl's."""
        ends, both = ("_two_shot", "_pdl", "_mnnvl"), (False, True)
        every = itertools.product(both, both, both)
        return {each: f"flashinfer.{self.name}{''.join(itertools.compress(ends, each))}" for each in every}

    @functools.cached_property
    def in_x_dtype(self) -> tuple[str, ...]:
        """The outputs of x's dtype and shape."""
        return tuple(name for name in self.outputs if name not in ("quantized", "scale"))

    @property
    def in_parts(self) -> bool:
        """Whether it can run on parts of the rows: the layout of packed and swizzled scales depends on all rows."""
        return self.quantization in ("", "static_fp8", "token_fp8")

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        """The names of its outputs, in order."""
        total = "residual_out" if self.adds else "reduced"
        if not self.norms:
            return (total,)
        if not self.quantization:
            return "normed", total
        scale = () if self.quantization == "static_fp8" else ("scale",)
        norm = ("normed",) if self.norm_out else ()
        return "quantized", *scale, *norm, total


def _kernels() -> tuple[Kernel, ...]:
    found = [Kernel("all_reduce", 0, "kAllReduce")]
    for start in ("all_reduce_rms_norm", "all_reduce_add_rms_norm"):
        found.append(Kernel(start, 1, "kARResidualRMSNorm"))
        for quantization, code, out_code, symbol in (
            ("static_fp8", 2, 4, "FP8Quant"),
            ("nvfp4", 3, 5, "FP4Quant"),
            ("group_fp8", 8, 9, "PerTokenGroupFP8PackedQuant"),
            ("token_fp8", 10, 11, "DynamicFP8Quant"),
        ):
            name = f"{start}_{quantization}"
            found.append(Kernel(name, code, f"kARResidualRMSNorm{symbol}", quantization))
            found.append(Kernel(name, out_code, f"kARResidualRMSNormOut{symbol}", quantization, True))
    return tuple(found)


KERNELS = _kernels()


@dataclass(frozen=True, eq=False)
class Form:
    """One of a kernel's forms, as it is launched.

    Attributes:
        kernel: The kernel.
        one_shot: Whether it reduces in one step; otherwise in two. None leaves it to FlashInfer (mnnvl).
        pdl: Whether it uses programmatic dependent launch.
        mnnvl: Whether it is a multicast kernel.
    """

    kernel: Kernel
    one_shot: bool | None
    pdl: bool
    mnnvl: bool

    def __str__(self) -> str:
        shots = {True: " one-shot", False: " two-shot", None: ""}[self.one_shot]
        return f"{self.kernel.symbol}{shots}{' with PDL' if self.pdl else ''}{' over multicast' if self.mnnvl else ''}"


def shaped(kernel: Kernel, found: Mapping[str, Tensor], lead: Sequence[int | torch.SymInt], scale_layout: str) -> Any:
    """The results in the kernel's order, with the input's leading dimensions.

    Packed and swizzled scales keep their two dimensions: their memory has no view with others.
    """
    results = [found[name] for name in kernel.outputs]
    if len(lead) != 1:
        own_rows = kernel.quantization == "group_fp8" or scale_layout != "linear"
        results = [
            each if name == "scale" and own_rows else each.view(*lead, each.shape[-1])
            for name, each in zip(kernel.outputs, results, strict=True)
        ]
    return results[0] if len(results) == 1 else tuple(results)


def allocate(
    kernel: Kernel, x: Tensor, *, group_size: int = 128, scale_layout: str = "swizzled_128x4"
) -> dict[str, Tensor]:
    """Uninitialised memory for the results by name, real or fake.

    Args:
        kernel: The kernel.
        x: ``[tokens, hidden]``.
        group_size: Elements per scale of ``group_fp8``.
        scale_layout: The layout of ``nvfp4`` scales.
    """
    found = {name: torch.empty_like(x) for name in kernel.in_x_dtype}
    if not kernel.quantization:
        return found
    tokens, hidden = x.shape
    if kernel.quantization == "nvfp4":
        found["quantized"] = x.new_empty(tokens, hidden // 2, dtype=torch.uint8)
        if scale_layout == "linear":
            found["scale"] = x.new_empty(tokens, hidden // 16, dtype=E4M3)
        else:  # the kernel leaves the padding as it is
            rows, columns = (tokens + 127) // 128 * 128, (hidden // 16 + 3) // 4 * 4
            found["scale"] = x.new_zeros(rows, columns, dtype=torch.uint8).view(E4M3)
    else:
        found["quantized"] = x.new_empty(tokens, hidden, dtype=E4M3)
        if kernel.quantization == "token_fp8":
            found["scale"] = x.new_empty(tokens, 1, dtype=torch.float32)
        elif kernel.quantization == "group_fp8":
            packed = (hidden // group_size + 3) // 4
            found["scale"] = x.new_empty_strided((tokens, packed), (1, (tokens + 3) // 4 * 4), dtype=torch.int32)
    return found
