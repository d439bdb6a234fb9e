"""The seed page's classes as models, in vLLM's operators and in plain torch, with every quantiser."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fusion_core.vocabulary.fp4 import quantize_mxfp4
from tests.corpus.quantisation import per_group, per_token

EPS = 1e-6
FNUZ = torch.float8_e4m3fnuz
FP8 = {"gfx942": FNUZ, "gfx950": torch.float8_e4m3fn}


def here() -> torch.dtype:
    """The GPU's FP8."""
    return FP8[os.environ["GPU_ARCHS"]]


class Spelling(NamedTuple):
    """How a model writes its steps."""

    reduce: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gemm: Callable[[Tensor, Tensor], Tensor]


def wide_norm(h: Tensor, weight: Tensor) -> Tensor:
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).type_as(h)


def plain_add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return wide_norm(total, weight), total


SPELLINGS = {
    "vllm": Spelling(
        lambda x: torch.ops.vllm.all_reduce(x, "tp:0"),
        lambda x, weight: torch.ops.vllm_ir.rms_norm(x, weight, EPS),
        lambda x, residual, weight: torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, EPS),
        lambda x, weight: torch.ops.vllm.rocm_unquantized_gemm(x, weight),
    ),
    "torch": Spelling(
        lambda x: funcol.all_reduce(x, "sum", dist.group.WORLD),
        wide_norm,
        plain_add_norm,
        lambda x, weight: x @ weight.t(),
    ),
}


def largest() -> float:
    return torch.finfo(here()).max


def static_buffers(n: Tensor, groups: int, column_major: bool = False) -> tuple[Tensor, Tensor]:
    shape, strides = ((n.shape[0], groups), (1, n.shape[0]) if column_major else (groups, 1))
    return torch.empty_like(n, dtype=here()), torch.empty_strided(shape, strides, dtype=torch.float32)


def vllm_group(n: Tensor, column_major: bool = False) -> tuple[Tensor, Tensor]:
    q, s = static_buffers(n, n.shape[1] // 128, column_major)
    torch.ops._C.per_token_group_fp8_quant(
        n, q, s, 128, 1e-10, -largest(), largest(), False, column_major, False
    )  # fmt: skip
    return q, s


def vllm_token(n: Tensor) -> tuple[Tensor, Tensor]:
    q, s = static_buffers(n, 1)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(q, n, s, None)
    return q, s


def plain_transposed(n: Tensor) -> tuple[Tensor, Tensor]:
    q, s = per_group(n, 128, 0.0, here(), largest())
    return q, s.t().contiguous().t()


QUANTISERS: dict[str, Callable[[Tensor], Any]] = {
    "triton": lambda n: torch.ops.vllm.triton_per_token_group_quant_fp8(n, 128),
    "aiter": lambda n: torch.ops.vllm.rocm_aiter_group_fp8_quant(n, 128),
    "aiter transposed": lambda n: torch.ops.vllm.rocm_aiter_group_fp8_quant(n, 128, True),
    "cuda": vllm_group,
    "cuda transposed": lambda n: vllm_group(n, True),
    "torch": lambda n: per_group(n, 128, 0.0, here(), largest()),
    "torch to 224": lambda n: per_group(n, 128, 0.0, here(), 224.0),
    "torch to 224 in the other format": lambda n: per_group(
        n, 128, 0.0, next(f for f in FP8.values() if f != here()), 224.0
    ),
    "torch transposed": plain_transposed,
    "cuda token": vllm_token,
    "aiter token": lambda n: torch.ops.vllm.rocm_aiter_per_token_quant(n, here()),
    "torch token": lambda n: per_token(n, 0.0, here(), largest()),
    "flashinfer mxfp4": lambda n: torch.ops.flashinfer.fp4_quantize(n, None, 32, True, False),
    "torch mxfp4": quantize_mxfp4,
}


# The seed page's classes, as its ``pattern`` methods have them: the model, and what it returns by name.

Model = tuple[Callable[..., tuple[Tensor, ...]], str]


def add_group_quant(s: Spelling, quantise: Any) -> Model:
    def pattern(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        rms, residual_out = s.add_norm(s.reduce(x), residual, weight)
        quant, scale = quantise(rms)
        return quant, scale, residual_out

    return pattern, "quantized scale residual_out"


def add_group_quant_with_indexer(s: Spelling, quantise: Any) -> Model:
    def pattern(residual: Tensor, x: Tensor, weight: Tensor, indexer: Tensor) -> tuple[Tensor, ...]:
        rms, res_out = s.add_norm(s.reduce(x), residual, weight)
        quant, scale = quantise(rms)
        return quant, scale, res_out, s.gemm(rms, indexer), rms

    return pattern, "quantized scale residual_out indexed normed"


def group_quant(s: Spelling, quantise: Any) -> Model:
    def pattern(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(quantise(s.norm(s.reduce(x), weight)))

    return pattern, "quantized scale"


def norm(s: Spelling, quantise: Any) -> Model:
    def pattern(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        reduced = s.reduce(x)
        return s.norm(reduced, weight), reduced

    return pattern, "normed reduced"


def add_norm(s: Spelling, quantise: Any) -> Model:
    def pattern(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return s.add_norm(s.reduce(x), residual, weight)

    return pattern, "normed residual_out"


def with_gemma(make: Callable[..., Model]) -> Callable[..., Model]:
    """The same with the weight that Gemma stores, as vLLM gives it to its norms."""

    def gemma(s: Spelling, quantise: Any) -> Model:
        return make(
            s._replace(
                norm=lambda x, weight: s.norm(x, weight.float() + 1.0),
                add_norm=lambda x, residual, weight: s.add_norm(x, residual, weight.float() + 1.0),
            ),
            quantise,
        )

    return gemma


MODELS: dict[str, Callable[..., Model]] = {
    "AiterAllreduceFusedAddRMSNormGroupQuantFP8Pattern": add_group_quant,
    "AiterAllreduceFusedAddRMSNormGroupQuantWithIndexerPattern": add_group_quant_with_indexer,
    "AiterAllreduceFusedRMSNormGroupQuantFP8Pattern": group_quant,
    "AllReduceRMSNormPattern": norm,
    "AllReduceFusedAddRMSNormPattern": add_norm,
    "AllReduceGemmaRMSNormPattern": with_gemma(norm),
    "AllReduceFusedAddGemmaRMSNormPattern": with_gemma(add_norm),
    "Gemma with group quantisation": with_gemma(add_group_quant),
}


class Block(torch.nn.Module):
    """Embedding and two layers as DeepSeek's have them, tensor parallel: five all-reduces.

    A plain norm first, then norms that feed FP8 projections, one of which an indexer reads too, and a plain one last.
    """

    def __init__(self, s: Spelling, quantise: Any, hidden: int) -> None:
        super().__init__()
        self.s, self.quantise = s, quantise
        common, own = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4 + dist.get_rank())
        self.norms = torch.nn.ParameterList((torch.rand(hidden, generator=common) + 0.5).bfloat16() for _ in range(5))
        self.indexer = torch.nn.Parameter((torch.randn(8, hidden, generator=common) / hidden**0.5).bfloat16())
        self.parts = torch.nn.ParameterList(
            (torch.randn(hidden, hidden, generator=own) / hidden**0.5).bfloat16() for _ in range(5)
        )

    def quantised(self, normed: Tensor) -> Tensor:
        """What an FP8 projection reads."""
        codes, scale = self.quantise(normed)
        return (codes.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)).flatten(-2).to(normed.dtype)

    def forward(self, x: Tensor) -> Tensor:
        s = self.s
        residual = s.reduce(x @ self.parts[0])
        normed = s.norm(residual, self.norms[0])
        normed, residual = s.add_norm(s.reduce(normed @ self.parts[1]), residual, self.norms[1])
        projected = self.quantised(normed) @ self.parts[2]
        normed, residual = s.add_norm(s.reduce(projected), residual, self.norms[2])
        chosen = s.gemm(normed, self.indexer).sum(-1, keepdim=True)
        projected = self.quantised(normed) @ self.parts[3] + chosen
        normed, residual = s.add_norm(s.reduce(projected), residual, self.norms[3])
        projected = self.quantised(normed) @ self.parts[4]
        normed, _ = s.add_norm(s.reduce(projected), residual, self.norms[4])
        return normed
