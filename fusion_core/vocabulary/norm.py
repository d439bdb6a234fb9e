"""The residual add and the RMSNorm of the neutral vocabulary."""

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
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        scale = weight.to(wide.dtype)
        normed = normed * (scale + weight_bias if weight_bias else scale)
    return normed.to(x.dtype if dtype is None else dtype)
