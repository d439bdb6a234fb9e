"""The residual add, the bias, RMSNorm and LayerNorm of the neutral vocabulary."""

from __future__ import annotations

import torch

from fusion_core.vocabulary.operation import operation


@operation(results=("sum",), commutative=("x", "residual"))
def add(x: torch.Tensor, residual: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The residual add: ``sum = x + residual``, rounded once.

    Args:
        x: ``[..., n]``, any floating dtype.
        residual: The same shape as ``x``; its dtype may differ (a float32 residual stream).
        dtype: Dtype of the result; None for that of torch's type promotion.

    Returns:
        ``[..., n]`` in ``dtype``; computed in ``dtype`` if that is wider than the operands.
    """
    if dtype is not None:
        x, residual = x.to(dtype), residual.to(dtype)
    return x + residual


@operation(results=("sum",))
def add_bias(x: torch.Tensor, bias: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The bias of a linear layer, added to each row: ``sum = x + bias``, rounded once.

    Args:
        x: ``[..., n]``, any floating dtype.
        bias: ``[n]``; its dtype may differ.
        dtype: Dtype of the result; None for that of torch's type promotion.

    Returns:
        ``[..., n]`` in ``dtype``; computed in ``dtype`` if that is wider than the operands.
    """
    if dtype is not None:
        x, bias = x.to(dtype), bias.to(dtype)
    return x + bias


@operation(results=("normed",))
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension, rounded once at the end.

    ``normed = x * rsqrt(mean(x^2) + eps) * (weight + weight_bias)``, computed in float32 (in float64 for float64).

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4, with ``eps`` inside the
    root, as in every implementation. ``weight_bias = 1`` is Gemma's form, whose stored weight is centred on zero.

    Args:
        x: ``[..., n]``, any floating dtype.
        weight: ``[n]``, or None for no weight (``weight_bias`` is then ignored).
        eps: Added to the mean of squares.
        weight_bias: Added to the weight.
        dtype: Dtype of the result; None for ``x.dtype``.

    Returns:
        ``[..., n]`` in ``dtype``.
    """
    wide = _wide(x)
    normed = _weighed(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps), weight, weight_bias)
    return normed.to(x.dtype if dtype is None else dtype)


@operation(results=("normed",))
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    weight_bias: float = 0.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Layer normalisation over the last dimension, rounded once at the end.

    ``normed = c * rsqrt(mean(c^2) + eps) * (weight + weight_bias) + bias`` with ``c = x - mean(x)``, computed in
    float32 (in float64 for float64).

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), section 3.1, with ``eps`` inside the root, as in
    ``torch.nn.functional.layer_norm``; the variance divides by ``n``. ``weight_bias = 1`` is Nemotron's form, whose
    stored weight is centred on zero.

    Args:
        x: ``[..., n]``, any floating dtype.
        weight: ``[n]``, or None for no weight (``weight_bias`` is then ignored).
        bias: ``[n]``, or None for no bias.
        eps: Added to the variance.
        weight_bias: Added to the weight.
        dtype: Dtype of the result; None for ``x.dtype``.

    Returns:
        ``[..., n]`` in ``dtype``.
    """
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = _weighed(centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps), weight, weight_bias)
    if bias is not None:
        normed = normed + bias.to(wide.dtype)
    return normed.to(x.dtype if dtype is None else dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _weighed(normed: torch.Tensor, weight: torch.Tensor | None, weight_bias: float) -> torch.Tensor:
    if weight is None:
        return normed
    scale = weight.to(normed.dtype)
    return normed * (scale + weight_bias if weight_bias else scale)
