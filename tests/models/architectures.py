"""The model families that these tests build: small, with random weights, and otherwise what Hugging Face ships."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS = 2
SITES = 2 * LAYERS + 1
"""The embedding's all_reduce, and for each layer that of the attention and that of the MLP."""

VOCABULARY = 128

# Four query heads on two key heads: under two ranks each keeps two and one, so that grouped-query attention stays.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    # Hugging Face's 0.02 is for hidden sizes in the thousands. At 64 it gives layers that hardly change the residual
    # and logits of a few hundredths, in which an error anywhere drowns; 0.15 gives logits of order 1.
    "initializer_range": 0.15,
}

ARCHITECTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=None),
    # Every expert for every token: which of two nearly equal experts a router takes hangs on the last bit, and where
    # two runs take different ones their errors say nothing about fusion.
    "mixtral": lambda: transformers.MixtralConfig(
        **_SIZES, sliding_window=None, num_local_experts=4, num_experts_per_tok=4
    ),
}


def save(name: str, folder: Path) -> Path:
    """A checkpoint of one architecture in float32, with weights that are the same on every call."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # as made they are all ones, and a norm that forgets its weight would pass
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
    path = folder / name
    model.save_pretrained(path)
    return path
