"""A model split over the ranks, summed by hooks, or in float64 on one rank."""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed import _functional_collectives as funcol
from torch.overrides import TorchFunctionMode


@functools.lru_cache(maxsize=2)
def load(path: Path, dtype: torch.dtype) -> Any:
    """The model, split over the ranks."""
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
    }
    with warnings.catch_warnings():
        # transformers 5.23 has a new spelling for it; this is the one that all of 5.x takes
        warnings.filterwarnings("ignore", "Passing `tp_plan` directly", FutureWarning)
        return transformers.AutoModelForCausalLM.from_pretrained(path, tp_plan="auto", dtype=dtype).eval()


@functools.lru_cache(maxsize=1)
def load_reduced_by_hooks(path: Path, dtype: torch.dtype) -> Any:
    """The model whole on every rank, summed over the ranks by hooks where tensor parallelism sums: the same sites.

    transformers' own way brings device meshes into the graph as inputs, and torch 2.13 hashes those by their address:
    no process finds what another one cached, with fusion_core or without. Here there are none.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def reduce(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(output, "sum", dist.group.WORLD)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(reduce)
    return model


@functools.lru_cache(maxsize=2)
def oracle(path: Path, dtype: torch.dtype) -> Any:
    """The model of the same weights, rounded to ``dtype``, computed in float64 and on one rank."""
    # experts one after another: torch's grouped matrix product takes no float64
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    return model.to(torch.float64).eval()


class AllFloat64(TorchFunctionMode):
    """Models cast to float32 by name, in norms, rotary embeddings and routers; here that means float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)
