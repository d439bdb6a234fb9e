"""torchrun --nproc-per-node 2 examples/hugging_face.py MODEL"""

import sys

import torch
from transformers import AutoModelForCausalLM

import fusion_core

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
model = torch.compile(model, backend="fusion_core")
with torch.no_grad():
    model(torch.arange(16, device=model.device).unsqueeze(0), use_cache=False)
print(fusion_core.last_report())
