"""The named shapes: layer sizes of models that `fusion_core.bench.stack` can represent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fusion_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one decoder layer, as the model's ``config.json`` gives them.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the gated MLP.
        heads: Query heads.
        kv_heads: Key-value heads.
        head_dim: Width of each head; heads × head_dim need not be ``hidden``.
        eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary embedding.
        source: The model with these sizes.
        qk_norm: Whether query and key are normed per head before the rotary embedding.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    source: str
    qk_norm: bool = False

    def indivisible(self, world_size: int) -> tuple[str, ...]:
        """The sizes that ``world_size`` does not divide, as text: ``("8 key-value heads",)``."""
        parts = {"heads": self.heads, "key-value heads": self.kv_heads, "MLP columns": self.intermediate}
        return tuple(f"{size} {name}" for name, size in parts.items() if size % world_size)

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain JSON types."""
        return dataclasses.asdict(self)


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-3-8b": Shape(4096, 14336, 32, 8, 128, 1e-5, 500_000.0, "meta-llama/Meta-Llama-3-8B"),
        "llama-3-70b": Shape(8192, 28672, 64, 8, 128, 1e-5, 500_000.0, "meta-llama/Meta-Llama-3-70B"),
        "mistral-7b": Shape(4096, 14336, 32, 8, 128, 1e-5, 1_000_000.0, "mistralai/Mistral-7B-v0.3"),
        "qwen3-32b": Shape(5120, 25600, 64, 8, 128, 1e-6, 1_000_000.0, "Qwen/Qwen3-32B", qk_norm=True),
        "tiny": Shape(256, 512, 8, 4, 32, 1e-5, 10_000.0, "no model: for trying the command, on CPUs too"),
    }
)
"""Name → sizes. Models with another block are not here, as the stack would not represent them: Gemma 2 norms a reduced
branch before it is added, DeepSeek has experts and another attention."""


def named(name: str, world_size: int) -> Shape:
    """The shape of this name.

    Raises:
        ConfigError: if there is none, or it cannot be split evenly over ``world_size`` ranks.
    """
    if name not in SHAPES:
        raise ConfigError(f"--shape is {name!r}, needs one of {', '.join(SHAPES)}")
    if found := SHAPES[name].indivisible(world_size):
        raise ConfigError(
            f"{name} has {', '.join(found)} for {world_size} ranks, needs a number of ranks that divides each"
        )
    return SHAPES[name]
