"""A Hugging Face Llama under tensor parallelism: a prefill and 64 greedy tokens, fused and unfused."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusion_core

SHAPES = {  # of Llama-3-8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
LAYERS, VOCABULARY, PROMPT, CACHE = 4, 32768, 128, 256


def load(dtype: torch.dtype) -> nn.Module:
    """Random weights, the same in every dtype, sharded by transformers' own plan."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    # transformers takes its ranks from torchrun's variables, and starts no process group where there is one
    ranks = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    zeros = {name: torch.zeros((), dtype=dtype).expand(each.shape) for name, each in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Passing `tp_plan` directly", FutureWarning)
        model: Any = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=zeros, tp_plan="auto", dtype=dtype
        ).eval()
    own, common = (torch.Generator("cuda").manual_seed(seed) for seed in (1 + dist.get_rank(), 0))
    with torch.no_grad():
        for parameter in model.parameters():
            sharded = hasattr(parameter, "to_local")
            shard = parameter.to_local() if sharded else parameter.data
            random = torch.randn(shard.shape, generator=own if sharded else common, device="cuda").mul_(0.02)
            values = torch.ones_like(random) if shard.dim() == 1 else random.bfloat16()
            if sharded:
                shard.copy_(values)
            else:  # still zeros that share one element
                parameter.data = values.to(dtype)
    assert any(hasattr(parameter, "to_local") for parameter in model.parameters()), "nothing is sharded"
    return model  # type: ignore[no-any-return]


def cache_for(model: Any, dtype: torch.dtype) -> Any:
    """An empty static cache of this rank's heads."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    heads = SHAPES["num_key_value_heads"] // dist.get_world_size()
    cache.early_initialization(1, heads, SHAPES["head_dim"], dtype, torch.device("cuda"))
    return cache


def logits(model: Any, cache: Any, prompt: Tensor, forced: Tensor | None, steps: int, **options: Any) -> Tensor:
    """The logits of the prompt's last token and of each further one, float32 ``[steps, vocabulary]``.

    Args:
        model: The model.
        cache: Its cache.
        prompt: Token ids ``[1, PROMPT]``.
        forced: Tokens to feed instead of the likeliest ones.
        steps: How many tokens.
        options: Of torch.compile; without any the model runs eagerly.
    """

    def step(ids: Tensor, cache: Any) -> Tensor:
        result: Tensor = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
        return result

    function: Any = torch.compile(step, fullgraph=True, dynamic=False, **options) if options else step
    found = []
    ids = prompt
    with torch.no_grad():
        for index in range(steps):
            if options:
                torch.compiler.cudagraph_mark_step_begin()
            found.append(function(ids, cache).float().clone())
            ids = (found[-1].argmax(-1) if forced is None else forced[index : index + 1]).view(1, 1).clone()
    return torch.cat(found)


def generate(steps: int) -> dict[str, Any]:
    """Errors of fused and unfused logits from a float32 run of the same tokens, and how often they choose the same."""
    prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    model = load(torch.bfloat16)
    plain = logits(model, cache_for(model, torch.bfloat16), prompt, None, steps, mode="reduce-overhead")
    tokens = plain.argmax(-1)
    before = len(fusion_core.reports())
    fused = logits(
        model, cache_for(model, torch.bfloat16), prompt, tokens, steps, mode="reduce-overhead", backend="fusion_core"
    )
    reports = [report for report in fusion_core.reports()[before:] if report.sites]
    eager = logits(model, cache_for(model, torch.bfloat16), prompt, tokens, steps)
    exact_model = load(torch.float32)
    exact = logits(exact_model, cache_for(exact_model, torch.float32), prompt, tokens, steps)
    margin = exact.topk(2).values
    clear = (margin[:, 0] - margin[:, 1]) > 4 * (plain - exact).abs().amax(-1)
    return {
        "strategies": [[site.strategy for site in report.sites] for report in reports],
        "run_time": [str(reason) for report in reports for site in report.sites for reason in site.run_time],
        "fused_error": float((fused - exact).abs().max()),
        # the definition's own: Inductor leaves roundings out that the model asks for, and a fused kernel does not
        "eager_error": float((eager - exact).abs().max()),
        "plain_error": float((plain - exact).abs().max()),
        "magnitude": float(exact.abs().max()),
        "same_token": float((fused.argmax(-1) == tokens).float().mean()),
        "clear": int(clear.sum()),
        "same_where_clear": bool((fused.argmax(-1) == tokens)[clear].all()),
    }
