"""One spelling of a chain as a row of data, and the pieces that rows are written with.

A row is added to one of the lists beside this file; ``test_corpus.py`` compiles and judges all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from tests.support.device import DEVICE

N = 16
WIDE = 256  # two groups of 128
EPS = 1e-5
FP8 = torch.float8_e4m3fn
FNUZ = torch.float8_e4m3fnuz

BARE = "all_reduce"
PLAIN = "all_reduce_rms_norm"
ADD = "all_reduce_add_rms_norm"
SANDWICH = "all_reduce_rms_norm_add_rms_norm"
LAYER = "all_reduce_layer_norm"
ADD_LAYER = "all_reduce_add_layer_norm"
BIAS = "all_reduce_bias"

NORMED, RESIDUAL, REDUCED = {"normed"}, {"residual_out"}, {"reduced"}
BOTH = NORMED | RESIDUAL


@dataclass(frozen=True)
class Given:
    """The tensors that a row is run with: x, residual, weight, and what ``more`` makes.

    Attributes:
        shape: Of x and the residual.
        dtype: Of x.
        residual: Dtype of the residual; None for ``dtype``.
        weight: Dtype of the weight; None for ``dtype``.
        more: Makers of further tensors.
        dynamic: Dimensions of x and the residual whose sizes are symbols.
        unbacked: Dimensions of x and the residual whose sizes are symbols without a value at compile time.
        seed: Of the random numbers.
    """

    shape: tuple[int, ...] = (2, 3, N)
    dtype: torch.dtype = torch.bfloat16
    residual: torch.dtype | None = None
    weight: torch.dtype | None = None
    more: tuple[Callable[[], Tensor], ...] = ()
    dynamic: tuple[int, ...] = ()
    unbacked: tuple[int, ...] = ()
    seed: int = 0

    def __call__(self, *, marked: bool = False) -> tuple[Tensor, ...]:
        """The same tensors on every call: a function that writes into them must not reach the next run."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        shapes = (self.shape, self.shape, self.shape[-1:])
        x, residual, weight = (
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE) for shape in shapes
        )
        x, residual = x.to(self.dtype), residual.to(self.residual or self.dtype)
        if marked:
            for tensor in (x, residual):
                for dimension in self.dynamic:
                    torch._dynamo.mark_dynamic(tensor, dimension)
                for dimension in self.unbacked:
                    torch._dynamo.decorators.mark_unbacked(tensor, dimension)
        return (x, residual, weight.to(self.weight or self.dtype), *(make() for make in self.more))


@dataclass(frozen=True)
class Case:
    """A spelling that must be found.

    Attributes:
        name: What the spelling is, for people.
        function: The spelling, called with what ``given`` makes.
        pattern: The pattern that is fused.
        live: Its live outputs.
        attributes: The site's attributes that differ from the usual: eps 1e-5 and nothing else.
        given: The tensors that it is run with.
        weight: Whether the norm has one.
        bias: Whether the LayerNorm has one.
        others: Patterns of the graph's other all_reduces, before and behind the row's own.
        dynamic: Compiled with every size a symbol.
    """

    name: str
    function: Callable[..., Any]
    pattern: str = ADD
    live: frozenset[str] | set[str] = frozenset(NORMED)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    given: Given = Given()
    weight: bool = True
    bias: bool = False
    others: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    dynamic: bool = False


@dataclass(frozen=True)
class NearMiss:
    """A spelling that looks like a longer pattern and is none.

    Attributes:
        name: What the difference is, for people.
        function: The spelling, called with what ``given`` makes.
        stands: The longest pattern that does stand there.
        because: What the refusal of the longer pattern says.
        of: The longer pattern.
        given: The tensors that it is run with.
        others: Patterns of the graph's other all_reduces, before and behind the row's own.
        dynamic: Compiled with every size, and every float that is not a literal, a symbol.
        by_casts: The difference is a rounding alone.
    """

    name: str
    function: Callable[..., Any]
    stands: str
    because: str
    of: str = ADD
    given: Given = Given()
    others: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    dynamic: bool = False
    by_casts: bool = False


def reduce(x: Tensor, op: str = "sum") -> Tensor:
    """The sum over all ranks, of a value of the model's own, never of an input itself."""
    return funcol.all_reduce(x * 1, op, torch.distributed.group.WORLD)


def norm(h: Tensor, weight: Tensor | None, eps: float = EPS) -> Tensor:
    """As Hugging Face's Llama writes it: rounded, then multiplied by the weight."""
    wide = h.to(torch.float32)
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)
    return normed if weight is None else weight * normed


AFTER = {"weight_after_cast": True}
"""What a site of `norm` has beside the usual attributes, in 16-bit dtypes with a weight."""


def wide_norm(h: Tensor, weight: Tensor) -> Tensor:
    """As Gemma writes it, but for the bias: multiplied by the weight, then rounded."""
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).type_as(h)


def layer_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None = None, eps: float = EPS) -> Tensor:
    """As torch has it."""
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps)


def gemma(h: Tensor, weight: Tensor) -> Tensor:
    """Gemma's norm, whose weight is centred on zero."""
    wide = h.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).type_as(h)
