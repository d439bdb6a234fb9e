"""torchrun --nproc-per-node 2 --local-ranks-filter 0 examples/huggingface/accelerate_plugin.py MODEL"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusion_core

# accelerate takes the backends of its own list alone, and so does Trainer: the pass goes in as Inductor's.
options = {"post_grad_custom_post_pass": fusion_core.FusionPass()}
accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="inductor", options=options))

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = accelerator.prepare_model(model, evaluation_mode=True)

prompt = tokenizer("ban den fin gor", return_tensors="pt").to(accelerator.device)
with torch.no_grad():
    logits = model(**prompt, use_cache=False).logits
print("ban den fin gor", tokenizer.decode(logits[0, -1].argmax()))
for report in fusion_core.reports():
    print([site.pattern for site in report.fused])
