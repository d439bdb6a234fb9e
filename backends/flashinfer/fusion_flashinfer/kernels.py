"""FlashInfer's fused kernels: which pattern each one runs and what it gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Kernel:
    """One of ``AllReduceFusionPattern`` as one operator: with a residual or, by one of zeros, without.

    Attributes:
        pattern: The pattern's name.
        code: FlashInfer's code.
        symbol: FlashInfer's name.
        quantization: ``""``, ``"static_fp8"``, ``"token_fp8"``, ``"group_fp8"`` or ``"nvfp4"``.
        norm_out: Whether it gives the norm beside its quantisation.
    """

    pattern: str
    code: int
    symbol: str
    quantization: str = ""
    norm_out: bool = False

    @property
    def name(self) -> str:
        """The operator's name, and the strategy's behind ``flashinfer.``."""
        return f"{self.pattern}_out" if self.norm_out else self.pattern

    @functools.cached_property
    def adds(self) -> bool:
        """Whether it takes a residual."""
        return "_add_" in self.pattern

    @functools.cached_property
    def norms(self) -> bool:
        """Whether there is more to it than the sum."""
        return self.pattern != "all_reduce"

    @property
    def in_parts(self) -> bool:
        """Whether rows can be given to it in parts: packed and swizzled scales have a layout of the whole."""
        return self.quantization in ("", "static_fp8", "token_fp8")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it gives, in order."""
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


@dataclass(slots=True)
class Buffers:
    """What one call writes; None for what its kernel does not give.

    ``scale_has_own_rows`` for packed and swizzled scales, whose memory has no view with x's leading dimensions.
    """

    total: Tensor
    normed: Tensor | None = None
    quantized: Tensor | None = None
    scale: Tensor | None = None
    scale_has_own_rows: bool = False

    def part(self, rows: slice) -> Buffers:
        """Some of the rows, of a kernel that can be run in parts."""
        given = (self.total, self.normed, self.quantized, self.scale)
        return Buffers(*(None if each is None else each[rows] for each in given))  # type: ignore[arg-type]

    def shaped(self, kernel: Kernel, lead: Sequence[int | torch.SymInt]) -> Any:
        """The results in the kernel's order, with the input's leading dimensions."""
        if not kernel.quantization:
            results = [self.total] if self.normed is None else [self.normed, self.total]
        else:
            assert self.quantized is not None
            results = [self.quantized]
            if self.scale is not None:
                results.append(self.scale)
            if kernel.norm_out:
                assert self.normed is not None
                results.append(self.normed)
            results.append(self.total)
        if len(lead) != 1:
            results = [
                each if self.scale_has_own_rows and each is self.scale else _unflat(each, lead) for each in results
            ]
        return results[0] if len(results) == 1 else tuple(results)


def _unflat(result: Tensor, lead: Sequence[int | torch.SymInt]) -> Tensor:
    return result.view(*lead, result.shape[-1])


def allocate(kernel: Kernel, x: Tensor, *, group_size: int = 128, scale_layout: str = "swizzled_128x4") -> Buffers:
    """Uninitialised memory for the results, real or fake.

    Args:
        kernel: The kernel.
        x: ``[tokens, hidden]``.
        group_size: Of ``group_fp8``.
        scale_layout: Of ``nvfp4``.
    """
    if not kernel.quantization:
        return Buffers(torch.empty_like(x), torch.empty_like(x) if kernel.norms else None)
    tokens, hidden = x.shape
    found = Buffers(torch.empty_like(x), torch.empty_like(x) if kernel.norm_out else None)
    if kernel.quantization == "nvfp4":
        found.quantized = x.new_empty(tokens, hidden // 2, dtype=torch.uint8)
        if scale_layout == "linear":
            found.scale = x.new_empty(tokens, hidden // 16, dtype=E4M3)
        else:  # the kernel leaves the padding as it is
            found.scale_has_own_rows = True
            rows, columns = (tokens + 127) // 128 * 128, (hidden // 16 + 3) // 4 * 4
            found.scale = x.new_zeros(rows, columns, dtype=torch.uint8).view(E4M3)
    else:
        found.quantized = x.new_empty(tokens, hidden, dtype=E4M3)
        if kernel.quantization == "token_fp8":
            found.scale = x.new_empty(tokens, 1, dtype=torch.float32)
        elif kernel.quantization == "group_fp8":
            found.scale_has_own_rows = True
            packed = (hidden // group_size + 3) // 4
            found.scale = x.new_empty_strided((tokens, packed), (1, (tokens + 3) // 4 * 4), dtype=torch.int32)
    return found
