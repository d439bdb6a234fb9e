"""What fusion_core recognises in the model families of Hugging Face, as a Markdown table.

    python examples/recognised_models.py                  # all of them: a minute or two
    python examples/recognised_models.py gemma granite    # these

Needs no GPU and no download: small models with random weights, tensor-parallel in two processes on the CPU, by the
library's own plan (tp_plan="auto").
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

import fusion_core
from fusion_core.workers import WorkerError, WorkerPool

RANKS = 2
LAYERS = 2
VOCABULARY = 128

# Four query heads on two key heads: under two ranks each keeps two and one, so that grouped-query attention stays.
SIZES: dict[str, Any] = {
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
HEADS = {"head_dim": 16}
SOFTCAP = {**HEADS, "query_pre_attn_scalar": 16}
# Every expert for every token: which of two nearly equal experts a router takes hangs on the last bit, and where two
# runs take different ones their errors say nothing about fusion.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
PADDING = {"pad_token_id": 0}  # where the default lies outside of so small a vocabulary


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        config: Its configuration's class in transformers.
        settings: What it takes beside `SIZES`.
        why: Why at some of its all_reduces no longer pattern stands than the sum itself.
    """

    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


SCALED_EMBEDDING = "the embedding's sum is scaled before it is normed"
BARE_EMBEDDING = "the embedding's sum goes into the first layer without a norm"
LAYER_NORM = "LayerNorm"
EACH_EXPERT = "what each expert gives is summed over the ranks, and over the experts only then"

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig"),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", HEADS),
    "mistral": Family("MistralConfig", {"sliding_window": None}),
    "phi3": Family("Phi3Config", PADDING),
    "mixtral": Family("MixtralConfig", {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen3_moe": Family("Qwen3MoeConfig", {**HEADS, **EXPERTS}),
    "qwen2_moe": Family("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "llama4": Family(
        "Llama4TextConfig", {**HEADS, **PADDING, "num_local_experts": 4, "num_experts_per_tok": 4}, EACH_EXPERT
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {
            **EXPERTS,
            **LATENT,
            "n_routed_experts": 4,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gemma": Family("GemmaConfig", HEADS, SCALED_EMBEDDING),
    "gemma2": Family("Gemma2Config", SOFTCAP, SCALED_EMBEDDING),
    "gemma3": Family("Gemma3TextConfig", SOFTCAP, SCALED_EMBEDDING),
    "glm4": Family("Glm4Config", {**HEADS, **PADDING}),
    "olmo2": Family("Olmo2Config", why=BARE_EMBEDDING),
    "granite": Family(
        "GraniteConfig",
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.25},
        "the embedding's sum and the sum of each branch are scaled before they are added",
    ),
    "cohere": Family("CohereConfig", {**PADDING, "logit_scale": 1.0}, LAYER_NORM),
    "cohere2": Family("Cohere2Config", {**PADDING, "logit_scale": 1.0}, LAYER_NORM),
    "phi": Family("PhiConfig", why=LAYER_NORM),
    "gpt_neox": Family("GPTNeoXConfig", why=LAYER_NORM),
}


def config(name: str) -> Any:
    """The configuration of a small model of a family."""
    family = FAMILIES[name]
    return getattr(transformers, family.config)(**{**SIZES, **family.settings})


def save(name: str, folder: Path) -> Path:
    """A checkpoint of one family in float32, with weights that are the same on every call."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # as made they do nothing, and a norm that forgets its weight would pass
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            elif parameter_name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
    path = folder / name
    model.save_pretrained(path)
    return path


def survey(path: Path) -> dict[str, Any]:
    """What fusion_core would do to a model, on one of several ranks."""
    quiet()
    torch.compiler.reset()  # it remembers numbers that differ from model to model, and would compile them as variables
    parallel = transformers.distributed.DistributedConfig(tp_plan="auto", tp_size=RANKS)
    # The library takes the accelerator that torch was built for, even where there is none; this runs on the CPU.
    with mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu")):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, distributed_config=parallel
        )
    with torch.no_grad():
        chosen = fusion_core.FusionConfig(order=("reference",), merge=True)
        report = fusion_core.explain(model.eval(), torch.arange(8).unsqueeze(0), config=chosen, use_cache=False)
    return report.to_dict()


def quiet() -> None:
    """Progress bars, advice and warnings of the library have no place in a table."""
    os.dup2(2, 1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Reports by family, as a Markdown table."""
    lines = ["| model | all_reduces | recognised | the sum alone, because |", "| --- | --- | --- | --- |"]
    lines += [row(name, report) for name, report in reports.items()]
    versions = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"
    return "\n".join([*lines, "", f"{versions}, {LAYERS} layers, {RANKS} processes, bfloat16"])


def row(name: str, report: Mapping[str, Any]) -> str:
    """One line of the table."""
    sites = report["sites"]
    model = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config(name))].__name__
    per_layer, embedding = divmod(len(sites), LAYERS)
    total = f"{per_layer} a layer" + (f" + {embedding}" if embedding else "")
    if gone := sum(len(merge["nodes"]) - 1 for merge in report["merges"] if not merge["reasons"]):
        total += f", merged from {len(sites) + gone}"
    longer = Counter(spelled(site) for site in sites if site["pattern"] != "all_reduce")
    patterns = ", ".join(f"{count} {pattern}" for pattern, count in longer.items())
    alone = len(sites) - longer.total()
    return f"| `{model}` | {len(sites)} = {total} | {patterns} | {f'{alone}: {FAMILIES[name].why}' if alone else ''} |"


def spelled(site: Mapping[str, Any]) -> str:
    """The pattern of a site, with what is unusual about it."""
    bias = site["attributes"].get("weight_bias")
    return f"`{site['pattern']}`" + (f" (weight + {bias:g})" if bias else "")


def main(arguments: Iterable[str] | None = None) -> int:
    """Print the table of the families that the command line names."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"any of {', '.join(FAMILIES)}; all by default")
    names = parser.parse_args(None if arguments is None else list(arguments)).families or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        parser.error(f"{', '.join(unknown)} is not among the families, needs any of {', '.join(FAMILIES)}")
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder, WorkerPool(RANKS, timeout=300.0) as pool:
        try:
            reports = {name: pool.run(survey, save(name, Path(folder)))[0] for name in names}
        except WorkerError as error:
            print(error, file=sys.stderr)
            return 1
    print(table(reports))
    return 0


if __name__ == "__main__":
    # workers import functions by their module, and __main__ is none that they could import
    import recognised_models

    sys.exit(recognised_models.main())
