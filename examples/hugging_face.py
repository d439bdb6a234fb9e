"""torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/hugging_face.py MODEL"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

import fusion_core

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
fused = CompileConfig(backend="fusion_core")
fused._compile_all_devices = True  # on a CPU too, to try it

prompt = tokenizer("ban den fin gor", return_tensors="pt").to(model.device)
tokens = model.generate(**prompt, max_new_tokens=8, cache_implementation="static", compile_config=fused)
print(tokenizer.decode(tokens[0]))
print(fusion_core.last_report())
