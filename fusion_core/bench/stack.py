"""A tensor-parallel decoder stack in plain torch: one decode step of a named shape, with random weights.

Each block is Llama's: RMSNorm, attention, all_reduce, residual add, RMSNorm, gated MLP, all_reduce, residual add; plus
Qwen3's norms of query and key if the shape has them. Projections into a block are split by columns, those out of it by
rows, and one functional all_reduce sums the ranks' partial results. There is no embedding and no vocabulary projection.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fusion_core._torch.distributed import functional_all_reduce
from fusion_core.bench.shapes import Shape

DTYPE = torch.bfloat16
"""The dtype of weights, activations and cache, in which the models of all named shapes are published."""


class Norm(nn.Module):
    """RMSNorm over the last dimension: computed in float32, the weight applied in the input's dtype, as in Llama."""

    def __init__(self, size: int, eps: float, common: torch.Generator) -> None:
        super().__init__()
        weight = torch.empty(size, dtype=DTYPE, device=common.device)
        self.weight = nn.Parameter(weight.uniform_(0.5, 1.5, generator=common), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normed ``x``, in its shape and dtype."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Projection(nn.Module):
    """This rank's shard of a matrix, ``[rows, columns]``; the whole one's ``fan_in`` keeps results of order 1."""

    def __init__(self, rows: int, columns: int, fan_in: int, own: torch.Generator) -> None:
        super().__init__()
        weight = torch.empty(rows, columns, dtype=DTYPE, device=own.device)
        self.weight = nn.Parameter(weight.normal_(0.0, fan_in**-0.5, generator=own), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[tokens, columns]`` to ``[tokens, rows]``."""
        return F.linear(x, self.weight)


class Attention(nn.Module):
    """Attention of one new token per sequence over a full static cache; returns this rank's part of the sum.

    The cache is ``[batch, context, heads, head_dim]`` with random values. Its last position is the new token's, which
    every call writes again. A batch smaller than the cache's uses its first rows.
    """

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    rotation: torch.Tensor

    def __init__(
        self, shape: Shape, batch: int, context: int, ranks: int, own: torch.Generator, common: torch.Generator
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads // ranks, shape.kv_heads // ranks, shape.head_dim
        whole = shape.heads * shape.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Projection(rows, shape.hidden, shape.hidden, own)
        self.out = Projection(shape.hidden, self.heads * self.head_dim, whole, own)
        self.query_norm = Norm(self.head_dim, shape.eps, common) if shape.qk_norm else None
        self.key_norm = Norm(self.head_dim, shape.eps, common) if shape.qk_norm else None
        for name in ("key", "value"):
            cache = torch.empty(batch, context, self.kv_heads, self.head_dim, dtype=DTYPE, device=own.device)
            self.register_buffer(name, cache.normal_(generator=own))
        self.register_buffer("position", torch.tensor([context - 1], device=own.device))
        self.register_buffer("rotation", rotations(shape, context).to(own.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, hidden]`` to ``[batch, hidden]``, not yet summed over the ranks."""
        batch = x.shape[0]
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        query, key, value = (part.view(batch, -1, self.head_dim) for part in self.qkv(x).split(widths, dim=-1))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        cos, sin = self.rotation[:, self.position].unbind()
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        rows = torch.arange(batch, device=x.device)
        self.key[rows, self.position] = key
        self.value[rows, self.position] = value
        attended = F.scaled_dot_product_attention(
            query.unsqueeze(2), self.key[:batch].transpose(1, 2), self.value[:batch].transpose(1, 2), enable_gqa=True
        )
        out: torch.Tensor = self.out(attended.reshape(batch, -1))
        return out


class MLP(nn.Module):
    """The gated MLP; returns this rank's part of the sum."""

    def __init__(self, shape: Shape, ranks: int, own: torch.Generator) -> None:
        super().__init__()
        share = shape.intermediate // ranks
        self.gate_up = Projection(2 * share, shape.hidden, shape.hidden, own)
        self.down = Projection(shape.hidden, share, shape.intermediate, own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, hidden]`` to ``[batch, hidden]``, not yet summed over the ranks."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: torch.Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """One decoder layer."""

    def __init__(
        self,
        shape: Shape,
        batch: int,
        context: int,
        group: dist.ProcessGroup,
        own: torch.Generator,
        common: torch.Generator,
    ) -> None:
        super().__init__()
        ranks = group.size()
        self.group = group
        self.attention_norm, self.mlp_norm = (Norm(shape.hidden, shape.eps, common) for _ in range(2))
        self.attention = Attention(shape, batch, context, ranks, own, common)
        self.mlp = MLP(shape, ranks, own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, hidden]`` to the same shape, complete on every rank."""
        x = x + self.summed(self.attention(self.attention_norm(x)))
        return x + self.summed(self.mlp(self.mlp_norm(x)))

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' ``x``."""
        return functional_all_reduce(x, self.group)


class Stack(nn.Module):
    """A stack of decoder layers and the last norm.

    Args:
        shape: Sizes of a layer; each is split evenly over the group.
        layers: The number of layers.
        batch: The largest batch size that it will be called with; it sizes the cache.
        context: Tokens of each sequence in the cache, including the new one.
        group: The process group over which the layers are split.
        device: The device of all tensors.

    All ranks have the same norms; each has its own shards of the projections and its own heads of the cache.
    """

    def __init__(
        self,
        shape: Shape,
        layers: int,
        batch: int,
        context: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        super().__init__()
        own, common = (torch.Generator(device).manual_seed(seed) for seed in (1 + group.rank(), 0))
        self.blocks = nn.ModuleList(Block(shape, batch, context, group, own, common) for _ in range(layers))
        self.norm = Norm(shape.hidden, shape.eps, common)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One decode step of ``[batch, hidden]``, one token per sequence; repeated calls return the same result."""
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.norm(x)
        return out


def tokens(shape: Shape, batch: int, device: torch.device) -> torch.Tensor:
    """The input of a stack: ``[batch, hidden]``, the same on every rank."""
    generator = torch.Generator(device).manual_seed(batch)
    return torch.empty(batch, shape.hidden, dtype=DTYPE, device=device).normal_(generator=generator)


def rotations(shape: Shape, context: int) -> torch.Tensor:
    """Cosines and sines of the rotary embedding, ``[2, context, head_dim]``."""
    frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.outer(torch.arange(context), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).to(DTYPE)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, head_dim]`` with one position's rotary embedding; ``cos`` and ``sin`` are ``[1, head_dim]``."""
    half, rest = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-rest, half), dim=-1) * sin
