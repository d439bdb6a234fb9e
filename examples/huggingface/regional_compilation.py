"""torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/huggingface/regional_compilation.py MODEL"""

import sys

import torch
from accelerate.utils import compile_regions
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusion_core

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = compile_regions(model, backend="fusion_core", dynamic=True)

prompt = tokenizer("ban den fin gor", return_tensors="pt").to(model.device)
with torch.no_grad():
    logits = model(**prompt, use_cache=False).logits
print("ban den fin gor", tokenizer.decode(logits[0, -1].argmax()))
for report in fusion_core.reports():
    print([site.pattern for site in report.fused])
