"""The jobs of the workers of ``fusion-core demo``: build a Llama, load it in shards, run it with and without fusion.

Workers keep the model from one call to the next.
"""

from __future__ import annotations

import collections
import importlib
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fusion_core._torch.devices import only_cpu

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 512,
}
TOKENS = (2, 16)
CALLS = 10
"""How often a compiled model is called to measure its time."""


@dataclass(frozen=True)
class Run:
    """One way of running the model, on one rank.

    Attributes:
        logits: The logits.
        compile_seconds: Seconds of the first call, which compiles.
        call_seconds: Mean seconds of later calls.
        collectives: Name of a collective → how often one call ran it on the process group.
        reports: The reports of fusion_core as plain types.
    """

    logits: torch.Tensor
    compile_seconds: float
    call_seconds: float
    collectives: dict[str, int]
    reports: list[dict[str, Any]]


_models: dict[str, Any] = {}
"""The model of this process, set by `load`."""


def build(path: str, layers: int, dtype: str) -> int:
    """Write a Llama with random weights to ``path``, on rank 0; its number of parameters."""
    _keep_quiet()
    transformers = _transformers()
    if dist.get_rank() != 0:
        return 0
    # At the library's default of 0.02 a model this narrow barely leaves its embedding and logits stay near 0. With
    # 1 / sqrt(width) every layer, and every logit, is of order 1.
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers, initializer_range=SHAPE["hidden_size"] ** -0.5)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # by default all ones, so that a missing norm weight would not show
                parameter.uniform_(0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    return sum(parameter.numel() for parameter in model.parameters())


def load(path: str, dtype: str) -> None:
    """Load this rank's shard of the model with the tensor parallelism of transformers."""
    transformers = _transformers()
    parallel = importlib.import_module("transformers.distributed").DistributedConfig(
        tp_plan="auto", tp_size=dist.get_world_size()
    )
    # transformers picks the accelerator that torch was built for, even if there is none; this demo runs on the CPU.
    with only_cpu():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), distributed_config=parallel
        )
    _models["sharded"] = model.eval()


def compiled(backend: str) -> Run:
    """Compile the model with a backend of torch.compile, and run it."""
    from fusion_core.report import history

    model: Any = torch.compile(_models["sharded"], backend=backend, dynamic=False)
    ids = _ids()
    with torch.no_grad(), history.collecting() as reports:
        start = time.monotonic()
        logits = model(ids, use_cache=False).logits
        compile_seconds = time.monotonic() - start
        dist.barrier()
        start = time.monotonic()
        for _ in range(CALLS):
            model(ids, use_cache=False)
        call_seconds = (time.monotonic() - start) / CALLS
        collectives = _collectives(lambda: model(ids, use_cache=False))
    return Run(logits, compile_seconds, call_seconds, collectives, [report.to_dict() for report in reports])


def exact(path: str) -> torch.Tensor | None:
    """The logits of the same weights in float64, unsharded and not compiled, on rank 0."""
    if dist.get_rank() != 0:
        return None
    model = _transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":  # it computes in float32 even for float64 inputs
            module.forward = _exact_norm(module.weight, module.variance_epsilon)
    with torch.no_grad():
        logits: torch.Tensor = model(_ids(), use_cache=False).logits
    return logits


def _exact_norm(weight: torch.Tensor, eps: float) -> Any:
    return lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _ids() -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], TOKENS, generator=torch.Generator().manual_seed(0))


def _collectives(call: Any) -> dict[str, int]:
    """How often a call runs each collective on a process group.

    Eager and compiled code both reach a ProcessGroup through an operator ``c10d::*``, which the profiler records.
    Counting functional collectives would miss those that do not come from a graph.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        call()
    names = (event.name for event in profile.events() if event.name.startswith("c10d::"))
    return dict(sorted(collections.Counter(name.removeprefix("c10d::").rstrip("_") for name in names).items()))


def _keep_quiet() -> None:
    """Send the workers' output to stderr, since stdout is for the command's answer, and turn progress bars off."""
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler's engine
    logging = _transformers().utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _transformers() -> Any:
    """The library transformers, untyped, so that mypy does not need it.

    It imports torchao if that is installed, for quantised models, and torchao prints warnings about libraries that it
    cannot load. This model is not quantised, so torchao is hidden from this process.
    """
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # None makes Python's import raise ImportError
    return importlib.import_module("transformers")
