"""torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/huggingface/lora.py MODEL"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusion_core
from fusion_core import FusionConfig

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
# By default PEFT keeps an adapter in float32, so that the sum is rounded twice between all_reduce and norm.
model = PeftModel.from_pretrained(model, f"{sys.argv[1]}/lora", autocast_adapter_dtype=False).eval()
model.forward = fusion_core.compile(model.forward, FusionConfig(merge=True), dynamic=True)

prompt = tokenizer("ban den fin gor", return_tensors="pt").to(model.device)
with torch.no_grad():
    logits = model(**prompt, use_cache=False).logits
print("ban den fin gor", tokenizer.decode(logits[0, -1].argmax()))
for report in fusion_core.reports():
    print([site.pattern for site in report.fused])
