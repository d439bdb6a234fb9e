"""The model families that these tests build: small, with random weights, and otherwise what Hugging Face ships."""

from examples.recognised_models import FAMILIES, LAYERS, VOCABULARY, save

__all__ = ["ARCHITECTURES", "FAMILIES", "LAYERS", "SITES", "VOCABULARY", "save"]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "mixtral")
"""Those that are run in every dtype and setting."""

SITES = 2 * LAYERS + 1
"""Of these: the embedding's all_reduce, and for each layer that of the attention and that of the MLP."""
