"""One run of a real vLLM on CPU, as a program: what it generates, and what fusion_core reports, as JSON.

python engine.py '{"model": FOLDER, "out": FILE, "additional": {...}, "compilation": {...}, ...}'
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to ask the workers by functions of the lab
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
PROMPTS = [[1, 5, 9, 13, 17], [1, 100, 200, 300, 400, 500, 33], [1, 44], [1, *range(50, 90)]]


def main() -> None:
    job = json.loads(sys.argv[1])
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job["model"],
        tensor_parallel_size=job.get("ranks", 2),
        dtype=job.get("dtype", "float32"),
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        compilation_config=job.get("compilation", {}),
        seed=0,
        **({"additional_config": job["additional"]} if "additional" in job else {}),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=2, ignore_eos=True, prompt_logprobs=1)
    answers = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling)
    outputs = [each.outputs[0] for each in answers]
    found = {
        # of the prompts' own tokens: the same tokens, whatever is generated
        "prompts": [
            step[token].logprob
            for each in answers
            for step, token in zip(each.prompt_logprobs[1:], each.prompt_token_ids[1:], strict=True)
        ],
        "tokens": [list(each.token_ids) for each in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs
        ],
    }
    if importlib.util.find_spec("vllm_lab") is not None:
        from vllm_lab.asked import calls

        found["calls"] = llm.collective_rpc(calls)
    if "additional" in job:
        import fusion_vllm

        reports = fusion_vllm.report(llm)
        found["texts"] = [str(each) for each in reports]
        found["reports"] = [[each.to_dict() for each in worker.reports] for worker in reports]
        found["graphs"] = [worker.graphs for worker in reports]
    Path(job["out"]).write_text(json.dumps(found, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
