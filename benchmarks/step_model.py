"""A tensor-parallel Hugging Face model with random weights, and its cache: the model of `decode_step.py`."""

import warnings

import torch
import torch.distributed as dist
from ranks import device

SHAPES = {
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "olmo-2-32b": {
        "model_type": "olmo2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "tiny-olmo-2": {
        "model_type": "olmo2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
"""Arguments of a configuration, by name; a Llama's unless ``model_type`` says otherwise."""
TINY = tuple(name for name in SHAPES if name.startswith("tiny"))


def make_model(shape, layers, vocab):
    """Random weights on every rank, without a checkpoint: `from_pretrained` is given zeros that take no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        **{"model_type": "llama"} | SHAPES[shape],
        num_hidden_layers=layers,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    zeros = {
        name: torch.zeros((), dtype=torch.bfloat16).expand(meta.shape) for name, meta in empty.state_dict().items()
    }
    with warnings.catch_warnings():
        # transformers 5.23 has a new spelling for it; this is the one that all of 5.x takes
        warnings.filterwarnings("ignore", "Passing `tp_plan` directly", FutureWarning)
        model = (
            type(empty)
            .from_pretrained(None, config=config, state_dict=zeros, tp_plan="auto", dtype=torch.bfloat16)
            .eval()
        )
    fill(model)
    return model


@torch.no_grad()
def fill(model):
    """Weights of N(0, 0.02): a shard from a seed of the rank's own, what every rank has whole from a common one."""
    own, common = (torch.Generator(device()).manual_seed(seed) for seed in (1 + dist.get_rank(), 0))
    for name, parameter in model.named_parameters():
        sharded = hasattr(parameter, "to_local")
        shard = parameter.to_local() if sharded else parameter.data
        if shard.device != device():
            raise SystemExit(f"{name} was loaded to {shard.device}, needs {device()}")
        if not shard.is_contiguous():  # still the zeros that share one element
            if sharded:
                raise SystemExit(f"the shard of {name} has strides {shard.stride()}, needs contiguous memory")
            parameter.data = shard = torch.empty(shard.shape, dtype=shard.dtype, device=device())
        if shard.dim() == 1:
            shard.fill_(1.0)  # norms
        else:
            shard.normal_(0.0, 0.02, generator=own if sharded else common)
    if not any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        raise SystemExit("no parameter is sharded: this transformers does not split by DTensors; see --shape tiny")


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_cache(model, batch, positions):
    from transformers import StaticCache

    config = model.config
    heads = config.num_key_value_heads
    if config.model_type != "olmo2":  # whose keys are normed over all heads: its ranks gather them, and keep them all
        heads //= dist.get_world_size()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=positions)
    cache.early_initialization(batch, heads, head_dim, torch.bfloat16, device())
    return cache
