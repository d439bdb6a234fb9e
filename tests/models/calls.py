"""The calls of a model that a setting makes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.architectures import VOCABULARY
from tests.models.loading import AllFloat64, oracle

BATCH, LENGTH, OTHER_LENGTH = 2, 8, 11


@dataclass(frozen=True)
class Setting:
    """One way in which a user runs a model."""

    dynamic: bool
    cached: bool
    mode: str  # of torch: "no_grad" or "inference_mode"
    marked: bool = True  # sizes that change are marked; else ``torch.compile(dynamic=True)``, which makes floats inputs

    def __str__(self) -> str:
        sizes = ("dynamic" if self.marked else "all-dynamic") if self.dynamic else "static"
        return "-".join((sizes, "cache" if self.cached else "nocache", self.mode))

    def compile(self, model: Callable[..., Any], backend: Any) -> Callable[..., Any]:
        """What ``torch.compile`` makes of a model in one graph."""
        everything = True if self.dynamic and not self.marked else None
        return torch.compile(model, backend=backend, fullgraph=True, dynamic=everything)


def exact_logits(path: Path, dtype: torch.dtype, setting: Setting) -> list[torch.Tensor]:
    model = oracle(path, dtype)
    with AllFloat64():
        return generate(model, model, setting)


def tokens(seed: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def generate(
    model: Any, call: Callable[..., Any], setting: Setting, after_call: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """Logits of each call that a setting makes."""
    prompt, others = tokens(0, LENGTH), [tokens(1, 1), tokens(2, 1)] if setting.cached else [tokens(1, OTHER_LENGTH)]
    logits = []

    def step(ids: torch.Tensor, **kwargs: Any) -> None:
        logits.append(call(ids, **kwargs).logits.detach().clone())
        after_call()

    with getattr(torch, setting.mode)():
        mark = setting.dynamic and setting.marked
        if mark:
            torch._dynamo.mark_dynamic(prompt, 1)
        if not setting.cached:
            step(prompt, use_cache=False)
            if mark:
                torch._dynamo.mark_dynamic(others[0], 1)
            if setting.dynamic:
                step(others[0], use_cache=False)
            return logits
        cache = transformers.DynamicCache(config=model.config)
        step(prompt, past_key_values=cache, use_cache=True)
        # A static run would compile the second step anew, for a cache that is one longer.
        for ids in others if setting.dynamic else others[:1]:
            if setting.dynamic:
                _may_grow(cache, mark)
            step(ids, past_key_values=cache, use_cache=True)
    return logits


def _may_grow(cache: transformers.DynamicCache, mark: bool) -> None:
    """Tell Dynamo that the next step's cache is longer."""
    for layer in cache.layers:
        # The first step leaves transposed views and later ones do not: other strides would be another graph.
        layer.keys = layer.keys.clone(memory_format=torch.contiguous_format)
        layer.values = layer.values.clone(memory_format=torch.contiguous_format)
        if mark:
            torch._dynamo.mark_dynamic(layer.keys, 2)
            torch._dynamo.mark_dynamic(layer.values, 2)
