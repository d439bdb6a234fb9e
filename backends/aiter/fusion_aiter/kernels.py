"""AITER's fused kernels: the method that runs each pattern, and its outputs."""

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

PACK = 16
"""Bytes that a thread loads at once."""


@dataclass(frozen=True)
class Kernel:
    """One of ``CustomAllreduce``'s methods in one of its forms. A pattern without a residual passes zeros.

    Attributes:
        pattern: The pattern's name.
        method: AITER's name.
        quantization: ``""``, ``"token_fp8"``, ``"group_fp8"`` or ``"mxfp4"``.
        norm_out: Whether it returns the norm next to its quantisation (``emit_bf16``).
    """

    pattern: str
    method: str
    quantization: str = ""
    norm_out: bool = False

    @property
    def name(self) -> str:
        """The operator's name, and the strategy's after ``aiter.``."""
        return f"{self.pattern}_out" if self.norm_out else self.pattern

    @functools.cached_property
    def adds(self) -> bool:
        """Whether it takes a residual."""
        return "_add_" in self.pattern

    @functools.cached_property
    def norms(self) -> bool:
        """Whether it computes more than the sum."""
        return self.pattern != "all_reduce"

    @property
    def gemma(self) -> bool:
        """Whether it can add 1 to the weight; kernels that quantise by groups cannot."""
        return self.norms and self.quantization in ("", "token_fp8")

    @property
    def scalars(self) -> tuple[str, ...]:
        """The names of the pattern's scalars that it takes."""
        if not self.norms:
            return ()
        quantization = {"token_fp8": ("fp8_dtype",), "group_fp8": ("fp8_dtype", "group_size", "scale_layout")}
        return ("eps", *("weight_bias",) * self.gemma, *quantization.get(self.quantization, ()))

    @functools.cached_property
    def fixed(self) -> dict[str, Any]:
        """The pattern's scalars that are fixed in the kernel."""
        if self.quantization == "mxfp4":
            return {"ties": "away"}
        return {"min_scale": 0.0} if self.quantization else {}

    @functools.cached_property
    def definition(self) -> Pattern:
        """The pattern."""
        return next(each for each in CORE_PATTERNS if each.name == self.pattern)

    @functools.cached_property
    def staged(self) -> dict[tuple[bool, bool], Staged]:
        """The kernel as launched, by ``(one_stage, large)``."""
        return {each: Staged(self, *each) for each in itertools.product((False, True), (False, True))}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its outputs in the operator's order; AITER's own has the residual before the scale."""
        total = "residual_out" if self.adds else "reduced"
        if not self.norms:
            return (total,)
        if not self.quantization:
            return "normed", total
        return "quantized", "scale", *(("normed",) if self.norm_out else ()), total


def _kernels() -> tuple[Kernel, ...]:
    found = [Kernel("all_reduce", "all_reduce")]
    for start in ("all_reduce_rms_norm", "all_reduce_add_rms_norm"):
        found.append(Kernel(start, "fused_ar_rms"))
        for quantization, method in (
            ("token_fp8", "fused_ar_rms"),
            ("group_fp8", "fused_ar_rms_per_group_quant"),
            ("mxfp4", "fused_ar_rms_mxfp4_quant"),
        ):
            found += [Kernel(f"{start}_{quantization}", method, quantization, norm_out) for norm_out in (False, True)]
    return tuple(found)


KERNELS = _kernels()


@dataclass(frozen=True, eq=False)
class Staged:
    """A kernel as it is launched.

    Attributes:
        kernel: The kernel.
        one_stage: Whether it runs in one stage; otherwise in two.
        large: Whether the input has more than `stages.MOST_SHARED` bytes.
    """

    kernel: Kernel
    one_stage: bool
    large: bool

    def __str__(self) -> str:
        return f"{self.kernel.method} in {'one stage' if self.one_stage else 'two stages'}"


@dataclass(frozen=True)
class Form:
    """The format of a quantisation.

    Attributes:
        fp8_dtype: The dtype of FP8 codes.
        group_size: Elements per scale of ``group_fp8``.
        transposed: Whether group scales are column-major.
    """

    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    group_size: int = 128
    transposed: bool = False

    @classmethod
    def of(cls, scalars: Mapping[str, Any]) -> Form:
        """The format for a pattern's scalars."""
        layout = scalars.get("scale_layout", "row_major")
        dtype, size = scalars.get("fp8_dtype", cls.fp8_dtype), scalars.get("group_size", cls.group_size)
        return cls(dtype, size, layout == "column_major")


def allocate(kernel: Kernel, x: Tensor, form: Form) -> dict[str, Tensor]:
    """Uninitialised results by name, real or fake, with the strides that AITER gives them.

    Args:
        kernel: The kernel.
        x: ``[tokens, hidden]``, contiguous.
        form: The format of the quantisation.
    """
    tokens, hidden = x.shape
    found = {kernel.outputs[-1]: torch.empty_like(x)}
    if "normed" in kernel.outputs:
        found["normed"] = torch.empty_like(x)
    if kernel.quantization == "mxfp4":
        found["quantized"] = x.new_empty(tokens, hidden // 2, dtype=torch.uint8)
        found["scale"] = x.new_empty(tokens, hidden // 32, dtype=torch.uint8)
    elif kernel.quantization:
        found["quantized"] = x.new_empty(tokens, hidden, dtype=form.fp8_dtype)
        groups = hidden // form.group_size if kernel.quantization == "group_fp8" else 1
        if form.transposed:
            found["scale"] = x.new_empty(groups, tokens, dtype=torch.float32).t()
        else:
            found["scale"] = x.new_empty(tokens, groups, dtype=torch.float32)
    return found


def shaped(kernel: Kernel, found: Mapping[str, Tensor], lead: Sequence[int | torch.SymInt]) -> Any:
    """The results in the operator's order, with the input's leading dimensions."""
    results = [found[name] for name in kernel.outputs]
    if len(lead) != 1:
        results = [each.view(*lead, each.shape[-1]) for each in results]
    return results[0] if len(results) == 1 else tuple(results)
