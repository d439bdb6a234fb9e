"""One example of a property, as plain data, and the model that it describes. Workers import it: no test library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

Norm = Callable[[Tensor, Tensor | None, float, float], Tensor]
LayerNorm = Callable[[Tensor, Tensor | None, Tensor | None, float, float], Tensor]


@dataclass(frozen=True)
class Case:
    """A place in a model: ``all_reduce [+ residual] [→ norm]`` or ``all_reduce + bias``, and how it is written and run.

    Attributes:
        pattern: Name of the pattern that is written down.
        shape: Of the all_reduce's operand as the model sees it.
        dtype: Of the all_reduce's operand.
        residual_dtype: Of the residual; ``dtype`` or float32.
        layout: ``"contiguous"``, ``"transposed"`` or ``"sliced"``, of the operand; the residual has the next one.
        eps: Added to the mean of squares, or to the variance.
        weight: ``"none"``, ``"same"`` (as what is normed) or ``"float32"``.
        weight_bias: Added to the weight.
        spelling: Name of the function in `SPELLINGS` that norms.
        residual_first: ``residual + x`` instead of ``x + residual``.
        flattened: The all_reduce sees all tokens in one dimension, as behind a mixture of experts.
        in_place: ``dist.all_reduce`` of a fresh tensor, instead of the functional collective.
        live: What the model returns of the pattern's outputs.
        values: What the tensors hold, see `tensors`.
        dynamic: The first dimension is symbolic.
        seed: Of the random numbers.
        world_size: Ranks.
        bias: Whether a LayerNorm has one.
    """

    pattern: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    residual_dtype: torch.dtype
    layout: str
    eps: float
    weight: str
    weight_bias: float
    spelling: str
    residual_first: bool
    flattened: bool
    in_place: bool
    live: tuple[str, ...]
    values: str
    dynamic: bool
    seed: int
    world_size: int
    bias: bool = False

    @property
    def has_residual(self) -> bool:
        return "_add_" in self.pattern

    @property
    def has_norm(self) -> bool:
        return "norm" in self.pattern

    @property
    def has_bias(self) -> bool:
        return self.bias or self.pattern == "all_reduce_bias"

    @property
    def normed_input(self) -> torch.dtype:
        """The dtype of what is normed."""
        return torch.promote_types(self.dtype, self.residual_dtype) if self.has_residual else self.dtype

    @property
    def found(self) -> str:
        """The pattern that stands in the compiled graph, where what nobody uses is gone."""
        if self.pattern == "all_reduce_bias" and len(self.shape) == 1:  # a vector of its own shape is no bias
            return "all_reduce"
        return self.pattern if {"normed", "sum"} & {*self.live} else "all_reduce"

    @property
    def found_live(self) -> set[str]:
        """The live outputs that the place then has."""
        if self.found == self.pattern:
            return set(self.live)
        return {"reduced"}  # a residual add behind it is a user like any other


def _wide_rsqrt(h: Tensor, eps: float) -> Tensor:
    wide = h.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _scale(weight: Tensor, bias: float) -> Tensor:
    return weight + bias if bias else weight


def hugging_face(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """Llama's: the norm is rounded before the weight."""
    normed = _wide_rsqrt(h, eps).to(h.dtype)
    return normed if weight is None else _scale(weight, bias) * normed


def wide_weight(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """Gemma's: the weight in float32, and one rounding at the end."""
    normed = _wide_rsqrt(h, eps)
    return (normed if weight is None else normed * _scale(weight.float(), bias)).type_as(h)


def times_itself(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """``x * x``, and the root's inverse kept in a variable of its own."""
    wide = h.float()
    inverse = torch.rsqrt(eps + torch.mean(wide * wide, dim=-1, keepdim=True))
    normed = inverse * wide
    return (normed if weight is None else _scale(weight.float(), bias) * normed).to(h.dtype)


def division(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """Divided by a square root."""
    wide = h.float()
    normed = (wide / torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(h.dtype)
    return normed if weight is None else normed * _scale(weight, bias)


def sum_over_size(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """The mean written as a sum."""
    wide = h.float()
    normed = wide * torch.rsqrt((wide**2).sum(-1, keepdim=True) / h.shape[-1] + eps)
    return (normed if weight is None else normed * _scale(weight.float(), bias)).to(h.dtype)


def dropped_dimension(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """The mean without its dimension, which comes back with ``None``."""
    wide = h.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1) + eps)[..., None]
    return (normed if weight is None else normed * _scale(weight.float(), bias)).to(h.dtype)


def functional(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """PyTorch's own."""
    return F.rms_norm(h, h.shape[-1:], None if weight is None else _scale(weight, bias), eps)


def narrow(h: Tensor, weight: Tensor | None, bias: float, eps: float) -> Tensor:
    """All of it in the dtype of the input."""
    normed = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return normed if weight is None else normed * _scale(weight, bias)


SPELLINGS: dict[str, Norm] = {
    norm.__name__: norm
    for norm in (
        hugging_face, wide_weight, times_itself, division, sum_over_size, dropped_dimension, functional, narrow,
    )
}  # fmt: skip


def _affine(normed: Tensor, weight: Tensor | None, shift: Tensor | None, bias: float) -> Tensor:
    if weight is not None:
        normed = normed * _scale(weight.to(normed.dtype), bias)
    return normed if shift is None else normed + shift.to(normed.dtype)


def torchs_own(h: Tensor, weight: Tensor | None, shift: Tensor | None, bias: float, eps: float) -> Tensor:
    """``torch.nn.functional.layer_norm``."""
    return F.layer_norm(h, h.shape[-1:], None if weight is None else _scale(weight, bias), shift, eps)


def cohere(h: Tensor, weight: Tensor | None, shift: Tensor | None, bias: float, eps: float) -> Tensor:
    """Cohere's: all of it in float32, and one rounding at the end."""
    wide = h.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return _affine((wide - mean) * torch.rsqrt(variance + eps), weight, shift, bias).to(h.dtype)


def rounded_first(h: Tensor, weight: Tensor | None, shift: Tensor | None, bias: float, eps: float) -> Tensor:
    """The norm is rounded before the weight and the bias."""
    centred = h.float() - h.float().sum(-1, keepdim=True) / h.shape[-1]
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return _affine(normed.to(h.dtype), weight, shift, bias)


def by_its_variance(h: Tensor, weight: Tensor | None, shift: Tensor | None, bias: float, eps: float) -> Tensor:
    """The variance by torch's own function."""
    wide = h.float()
    normed = (wide - wide.mean(-1, keepdim=True)) * (wide.var(-1, correction=0, keepdim=True) + eps) ** -0.5
    return _affine(normed, weight, shift, bias).to(h.dtype)


LAYER_SPELLINGS: dict[str, LayerNorm] = {
    norm.__name__: norm for norm in (torchs_own, cohere, rounded_first, by_its_variance)
}


def model(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The function that a user would have written."""

    def reduce(x: Tensor) -> Tensor:
        if case.flattened:
            x = x.reshape(-1, x.shape[-1])
        if case.in_place:
            reduced = x + 0.0  # a value of the model's own, as a projection's would be
            dist.all_reduce(reduced)
        else:
            reduced = funcol.all_reduce(x, "sum", dist.group.WORLD)
        return reduced

    def run(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        values = {"reduced": reduce(x).reshape(x.shape)}
        hidden = values["reduced"]
        if residual is not None:
            hidden = residual + hidden if case.residual_first else hidden + residual
            values["residual_out"] = hidden
        if case.pattern == "all_reduce_bias":
            values["sum"] = hidden + bias
        elif case.spelling in LAYER_SPELLINGS:
            values["normed"] = LAYER_SPELLINGS[case.spelling](hidden, weight, bias, case.weight_bias, case.eps)
        elif case.has_norm:
            values["normed"] = SPELLINGS[case.spelling](hidden, weight, case.weight_bias, case.eps)
        return tuple(values[name] for name in case.live)

    return run


def tensors(case: Case) -> dict[str, Tensor | None]:
    """The tensors of this rank: x is each rank's own, residual and weight are everyone's."""
    own = torch.Generator().manual_seed(case.seed * 16 + dist.get_rank() + 1)
    common = torch.Generator().manual_seed(case.seed * 16)
    layouts = ("contiguous", "transposed", "sliced")
    following = layouts[(layouts.index(case.layout) + 1) % 3]
    hidden = case.shape[-1]
    weight = torch.randn(hidden, generator=common) + (1.0 - case.weight_bias)
    weight_dtype = torch.float32 if case.weight == "float32" else case.normed_input
    return {
        "x": laid_out(fill(case, case.shape, own).to(case.dtype), case.layout),
        "residual": laid_out(fill(case, case.shape, common).to(case.residual_dtype), following)
        if case.has_residual
        else None,
        "weight": weight.to(weight_dtype) if case.has_norm and case.weight != "none" else None,
        "bias": torch.randn(hidden, generator=common).to(weight_dtype) if case.has_bias else None,
    }


def fill(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers as real ones are, or as they should not be."""
    values = torch.randn(shape, generator=generator)
    rows = values.view(-1, shape[-1])
    narrow_range = torch.float16 in (case.dtype, case.residual_dtype)
    if case.values == "zeros":
        values.zero_()
    elif case.values == "zero row":
        rows[:1] = 0.0
    elif case.values == "huge row":
        rows[:1] *= 1e3 if narrow_range else 1e15
    elif case.values == "spike":
        rows[:, -1:] *= 1e3
    elif case.values == "tiny":
        values *= 1e-6 if narrow_range else 1e-20
    elif case.values == "small":
        values *= 1e-3
    return values


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.stack((values, torch.full_like(values, torch.nan)), -1)[..., 0]
    return values
