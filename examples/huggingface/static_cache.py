"""torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/huggingface/static_cache.py MODEL [MODE]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import fusion_core

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
fused = CompileConfig(backend="fusion_core", mode=(sys.argv[2:] or ["reduce-overhead"])[0])
fused._compile_all_devices = True  # transformers compiles generation on accelerators alone, unless this is set

prompt = tokenizer("ban den fin gor", return_tensors="pt").to(model.device)
tokens = model.generate(
    **prompt, max_new_tokens=8, do_sample=False, cache_implementation="static", compile_config=fused
)
print(tokenizer.decode(tokens[0]))
print(fusion_core.last_report())
