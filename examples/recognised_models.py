"""The patterns that fusion_core recognises in the model families of Hugging Face, as a Markdown table.

    python examples/recognised_models.py                  # all families: some ten minutes
    python examples/recognised_models.py gemma granite    # these families

Needs no GPU and no download: small models with random weights, tensor-parallel in two processes on the CPU, by
transformers' own plan (tp_plan="auto").
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

# Four query heads on two key heads: each of two ranks has two and one, so it still has grouped-query attention.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    # Hugging Face's 0.02 is for hidden sizes in the thousands. At 64 the layers would hardly change the residual, and
    # the logits of a few hundredths would hide errors; 0.15 gives logits of order 1.
    "initializer_range": 0.15,
}
HEADS = {"head_dim": 16}
SOFTCAP = {**HEADS, "query_pre_attn_scalar": 16}
# Every expert for every token: the router's choice between two nearly equal experts depends on the last bit, and if two
# runs choose differently, their difference is not due to fusion.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MLA = {**LATENT, "num_key_value_heads": 4}
PADDING = {"pad_token_id": 0}  # for families whose default is outside of so small a vocabulary
USUAL = {**HEADS, **PADDING}
FEW = {"num_experts": 4, "num_experts_per_tok": 4}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 4}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
EVERY_LAYER = {"first_k_dense_replace": 0}  # has experts: the table says how many sites a layer has
WINDOW = {"sliding_window": 64}
LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        config: Its configuration's class in transformers.
        settings: Settings in addition to `SIZES`.
        why: Why only the sum matches at some of its all_reduces.
    """

    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


SCALED_EMBEDDING = "the embedding's sum is scaled before it is normed"
BARE_EMBEDDING = "the embedding's sum goes into the first layer without a norm"
SCALED_BRANCHES = "the embedding's sum and the sum of each branch are scaled before they are added"
GATED_EXPERT = "the shared expert's sum is multiplied by a gate for each token"
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
        SCALED_BRANCHES,
    ),
    "cohere": Family("CohereConfig", {**PADDING, "logit_scale": 1.0}),
    "cohere2": Family("Cohere2Config", {**PADDING, "logit_scale": 1.0}),
    "phi": Family("PhiConfig"),
    "gpt_neox": Family("GPTNeoXConfig"),
    "afmoe": Family("AfmoeConfig", {**USUAL, **WINDOW, **EXPERTS, "num_dense_layers": 0}),
    "apertus": Family("ApertusConfig", PADDING),
    "arcee": Family("ArceeConfig", USUAL),
    "cohere2_moe": Family("Cohere2MoeConfig", {**USUAL, **WINDOW, **EXPERTS, "logit_scale": 1.0}),
    "cwm": Family("CwmConfig", {**USUAL, **WINDOW}),
    "deepseek_v2": Family("DeepseekV2Config", {**USUAL, **ROUTED, **MLA, **EVERY_LAYER}),
    "deepseek_v32": Family("DeepseekV32Config", {**USUAL, **ROUTED, **MLA, **EVERY_LAYER}),
    "dots1": Family("Dots1Config", {**USUAL, **ROUTED, **EVERY_LAYER, "n_shared_experts": 1}),
    "ernie4_5": Family("Ernie4_5Config", USUAL),
    "exaone4": Family("Exaone4Config", {**USUAL, **WINDOW, "sliding_window_pattern": 2}, BARE_EMBEDDING),
    "exaone_moe": Family("ExaoneMoeConfig", {**USUAL, **WINDOW, **ROUTED, "sliding_window_pattern": 2}),
    "flex_olmo": Family("FlexOlmoConfig", {**PADDING, **FEW}, BARE_EMBEDDING),
    "gemma4": Family("Gemma4TextConfig", {**HEADS, **WINDOW}, SCALED_EMBEDDING),
    "glm": Family("GlmConfig", USUAL),
    "glm4_moe": Family("Glm4MoeConfig", {**PADDING, **ROUTED, **EVERY_LAYER}),
    "glm4_moe_lite": Family("Glm4MoeLiteConfig", {**PADDING, **ROUTED, **MLA}),
    "glm_moe_dsa": Family("GlmMoeDsaConfig", {**USUAL, **ROUTED, **MLA, **EVERY_LAYER}),
    "granitemoe": Family("GraniteMoeConfig", {**PADDING, **LOCAL}),
    "granitemoeshared": Family("GraniteMoeSharedConfig", {**PADDING, **LOCAL, "shared_intermediate_size": 64}),
    "helium": Family("HeliumConfig", USUAL),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Config", {**USUAL, "num_experts": 4, "moe_topk": 4}),
    "hyperclovax": Family("HyperCLOVAXConfig", USUAL),
    "jais2": Family("Jais2Config", USUAL),
    "minicpm3": Family("MiniCPM3Config", {**USUAL, **MLA}, SCALED_BRANCHES),
    "minimax": Family("MiniMaxConfig", {**USUAL, **LOCAL, "sliding_window": None}),
    "minimax_m2": Family("MiniMaxM2Config", {**USUAL, **LOCAL}),
    "ministral": Family("MinistralConfig", {**USUAL, **WINDOW}),
    "ministral3": Family("Ministral3Config", {**USUAL, "sliding_window": None}),
    "nanochat": Family("NanoChatConfig", PADDING),
    "nemotron": Family("NemotronConfig", USUAL),
    "olmo": Family("OlmoConfig", PADDING),
    "olmo3": Family("Olmo3Config", {**PADDING, **WINDOW}, BARE_EMBEDDING),
    "olmoe": Family("OlmoeConfig", {**PADDING, **FEW}),
    "phimoe": Family("PhimoeConfig", {**PADDING, **LOCAL, "sliding_window": None}),
    "qwen3_5": Family("Qwen3_5TextConfig", {**USUAL, **LINEAR}),
    "qwen3_next": Family(
        "Qwen3NextConfig", {**USUAL, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 64}, GATED_EXPERT
    ),
    "seed_oss": Family("SeedOssConfig", USUAL),
    "smollm3": Family("SmolLM3Config", {**PADDING, "sliding_window": None}),
    "solar_open": Family("SolarOpenConfig", {**USUAL, **ROUTED}),
    "starcoder2": Family("Starcoder2Config", {**PADDING, "sliding_window": None}),
    "vaultgemma": Family("VaultGemmaConfig", {**SOFTCAP, **WINDOW}, SCALED_EMBEDDING),
    "youtu": Family("YoutuConfig", {**PADDING, **MLA}),
}


def config(name: str, **settings: Any) -> Any:
    """The configuration of a small model of one family."""
    family = FAMILIES[name]
    return getattr(transformers, family.config)(**{**SIZES, **family.settings, **settings})


def save(name: str, folder: Path, **settings: Any) -> Path:
    """A checkpoint of one family in float32, with weights that are the same on every call."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(name, **settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:  # initial weights are ones, so a norm without its weight would pass
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            elif parameter_name.endswith("bias"):
                parameter.uniform_(-0.1, 0.1)
    path = folder / name
    model.save_pretrained(path)
    return path


def survey(path: Path) -> dict[str, Any]:
    """The report of a dry run on a model, on one of several ranks."""
    quiet()
    torch.compiler.reset()  # numbers that differ between models would otherwise be compiled as variables
    parallel = transformers.distributed.DistributedConfig(tp_plan="auto", tp_size=RANKS)
    # transformers uses the accelerator that torch was built for, even if there is none; this runs on the CPU.
    with mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu")):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, distributed_config=parallel
        )
    with torch.no_grad():
        chosen = fusion_core.FusionConfig(order=("reference",), merge=True)
        report = fusion_core.explain(model.eval(), torch.arange(8).unsqueeze(0), config=chosen, use_cache=False)
    return report.to_dict()


def quiet() -> None:
    """Suppress transformers' progress bars, advice and warnings."""
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
    sites = [site for site in report["sites"] if site["collective"] == "all_reduce"]
    parts = Counter(spelled(site) for site in report["sites"] if site["collective"] != "all_reduce")
    model = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config(name))].__name__
    per_layer, embedding = divmod(len(sites), LAYERS)
    total = f"{per_layer} a layer" + (f" + {embedding}" if embedding else "")
    if gone := sum(len(merge["nodes"]) - 1 for merge in report["merges"] if not merge["reasons"]):
        total += f", merged from {len(sites) + gone}"
    longer = Counter(spelled(site) for site in sites if site["pattern"] != "all_reduce")
    patterns = ", ".join(f"{count} {pattern}" for pattern, count in (longer + parts).items())
    alone = len(sites) - longer.total()
    return f"| `{model}` | {len(sites)} = {total} | {patterns} | {f'{alone}: {FAMILIES[name].why}' if alone else ''} |"


def spelled(site: Mapping[str, Any]) -> str:
    """The pattern of a site, with Gemma's constant in the weight if there is one."""
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
    # workers import functions by module name, which does not work for __main__
    import recognised_models

    sys.exit(recognised_models.main())
