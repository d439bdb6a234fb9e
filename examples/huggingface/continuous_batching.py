"""torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/huggingface/continuous_batching.py MODEL"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, ContinuousBatchingConfig, GenerationConfig

import fusion_core

torch._dynamo.config.nested_graph_breaks = True  # else o_proj's all_reduce and its norm lie in two graphs

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
fused = CompileConfig(backend="fusion_core", mode="default", dynamic=True)
batching = ContinuousBatchingConfig(
    varlen_compile_config=fused, decode_compile_config=fused, num_blocks=8, max_batch_tokens=64
)

prompts = tokenizer(["ban den fin gor", "kan len", "min nor par"])["input_ids"]
greedy = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
results = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=batching)
for result in results.values():
    print(tokenizer.decode(result.prompt_ids + result.generated_tokens))
for report in fusion_core.reports():
    print([site.pattern for site in report.fused])
