"""torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/huggingface/dynamic_cache.py MODEL"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusion_core

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model.forward = torch.compile(model.forward, backend="fusion_core", dynamic=True)

prompt = tokenizer("ban den fin gor", return_tensors="pt").to(model.device)
tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(tokens[0]))
for report in fusion_core.reports():
    print([site.pattern for site in report.fused])
