"""A small Llama with random weights and a vocabulary of 128 words, to try the programs of docs/huggingface.md on.

    python examples/huggingface/small_model.py FOLDER

With PEFT installed, FOLDER/lora has an adapter for it.
"""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Hugging Face's 0.02 is for hidden sizes in the thousands: at 64 the largest logits would often be almost equal.
    "initializer_range": 0.15,
}
ONSETS, VOWELS, ENDS = "bdfgklmnprstvwzh", "aeio", "nr"
WORDS = [onset + vowel + end for onset in ONSETS for vowel in VOWELS for end in ENDS]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of `WORDS`: each is one token."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def save(folder: Path, sizes: Mapping[str, Any] = SIZES) -> None:
    """Write the model, the same on every call, and its tokenizer."""
    torch.manual_seed(0)
    # No token ends a text: a generation is as long as was asked for.
    config = LlamaConfig(**sizes, vocab_size=len(WORDS), bos_token_id=None, eos_token_id=None, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_adapter(source: Path, folder: Path) -> None:
    """Write an adapter for layers that are split by columns (q_proj) and by rows (the others)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source)
    lora = LoraConfig(r=8, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(folder)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
    if importlib.util.find_spec("peft"):
        save_adapter(Path(sys.argv[1]), Path(sys.argv[1]) / "lora")
