"""What the reference backend costs on GPUs: a Hugging Face Llama compiled with and without fusion_core, one run.

    torchrun --nproc-per-node 2 benchmarks/reference_cost.py --json benchmarks/results/reference_cost_h200x2.json

The reference backend puts the pattern's own torch code into the graph, so that Inductor generates what it generates
without it. The claim to check: the ratio of both step times is 1 within the noise of two runs of the same code.
"""

import argparse
import datetime
import faulthandler
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

faulthandler.dump_traceback_later(420, exit=True)  # a hang must not hold the machines


def model_on_disk(layers: int) -> Path:
    """Llama-3-70B's layer shapes with random weights, on a RAM disk; written by rank 0."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    path = Path(os.environ.get("MODEL_DIR", Path(tempfile.gettempdir(), "fusion_core_llama")))
    if dist.get_rank() == 0:
        config = LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=layers,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=32000,
            rms_norm_eps=1e-5,
        )
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path)
        del model
        torch.cuda.empty_cache()
    dist.barrier()
    return path


def step_time(step, repeat: int) -> float:
    """Median microseconds of one step on this rank, by device events."""
    for _ in range(5):
        step()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return statistics.median(times)


def kernels(step) -> int:
    """How many kernels one step runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    path = model_on_disk(options.layers)

    import transformers
    from transformers import AutoModelForCausalLM

    import fusion_core

    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.bfloat16).eval()
    rows = []
    with torch.no_grad():
        for tokens in options.tokens:
            generator = torch.Generator("cuda").manual_seed(tokens)
            ids = torch.randint(0, 32000, (1, tokens), device="cuda", generator=generator)
            torch._dynamo.reset()
            variants = {
                "plain": torch.compile(model.forward, mode="reduce-overhead", dynamic=False),
                "fused": torch.compile(model.forward, mode="reduce-overhead", dynamic=False, backend="fusion_core"),
            }
            logits = {name: step(ids, use_cache=False).logits.float().clone() for name, step in variants.items()}
            times: dict[str, list[float]] = {name: [] for name in variants}
            for turn in range(options.rounds):
                for name in list(variants)[:: 1 if turn % 2 else -1]:  # neither always runs on the warmer chip
                    step = functools.partial(variants[name], ids, use_cache=False)
                    slowest = torch.tensor(step_time(step, options.repeat), device="cuda")
                    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
                    times[name].append(slowest.item())
            plain, fused = (statistics.median(times[name]) for name in ("plain", "fused"))
            report = fusion_core.last_report()
            rows.append(
                {
                    "tokens": tokens,
                    "plain_us": round(plain, 1),
                    "fused_us": round(fused, 1),
                    "fused_over_plain": round(fused / plain, 4),
                    "plain_runs_us": [round(t, 1) for t in times["plain"]],
                    "fused_runs_us": [round(t, 1) for t in times["fused"]],
                    "kernels": {
                        name: kernels(functools.partial(step, ids, use_cache=False)) for name, step in variants.items()
                    },
                    "sites": [f"{site.pattern} {site.strategy}" for site in report.sites],
                    "largest_difference": float((logits["plain"] - logits["fused"]).abs().max()),
                    "largest_logit": float(logits["plain"].abs().max()),
                }
            )
    if dist.get_rank() == 0:
        record = {
            "command": f"torchrun --nproc-per-node {dist.get_world_size()} {' '.join(sys.argv)}",
            "date": datetime.date.today().isoformat(),
            "gpu": f"{dist.get_world_size()} x {torch.cuda.get_device_name()}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "layers": options.layers,
            "rows": rows,
        }
        print(report)
        print(json.dumps(record, indent=1))
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(path, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # destroy_process_group hangs while CUDA graphs hold NCCL work


if __name__ == "__main__":
    main()
