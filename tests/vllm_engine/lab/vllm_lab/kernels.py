"""A backend that is opaque to Inductor, on CPUs and for vLLM's all_reduce too: each pattern's definition, as one operator.

`reference` leaves vLLM's all_reduce alone, which may be faster than torch's. Fused kernels need a GPU. These stand for
them: what a graph holds, caches and runs is the same.
"""

import functools
import multiprocessing
import os
from typing import Any

import torch
from torch import Tensor

from fusion_core import OnDevice, Pattern, Strategy, hookimpl
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.workspaces import register_operator

LIBRARY = torch.library.Library("vllm_lab", "DEF")
CALLS: dict[str, int] = {}
"""Strategy → how often it ran in this process."""
PATTERNS = [each for each in CORE_PATTERNS if each.collective == "all_reduce" and "fp4" not in each.name]


def _results(pattern: Pattern, **given: Any) -> Tensor | tuple[Tensor, ...]:
    found = pattern.function(**given)
    # an operator's results share no memory with its arguments or with each other
    return tuple(each.clone() for each in found) if isinstance(found, tuple) else found.clone()


def _run(pattern: Pattern, **given: Any) -> Tensor | tuple[Tensor, ...]:
    name = f"lab.{pattern.name}"
    CALLS[name] = CALLS.get(name, 0) + 1
    return _results(pattern, **given)


def _operator(pattern: Pattern) -> Any:
    run, fake = (functools.partial(function, pattern) for function in (_run, _results))
    optional = [name for name in pattern.tensors if pattern.parameters[name].optional]
    return register_operator(LIBRARY, pattern, run, fake, optional=optional)


STRATEGIES = [
    Strategy(each.name, f"lab.{each.name}", _operator(each), (OnDevice("cpu"),), outputs=each.outputs)
    for each in PATTERNS
]


@hookimpl
def fusion_strategies() -> list[Strategy]:
    # a worker that an environment variable names has none, as if another version were installed there
    without = os.environ.get("VLLM_LAB_WITHOUT")
    return [] if without == multiprocessing.current_process().name else STRATEGIES
