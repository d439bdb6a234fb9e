"""A broken plugin in a compilation by all of Inductor, in this process or on each of several ranks."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.metadata import EntryPoint
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor.compile_fx import compile_fx

from fusion_core import FusionConfig, FusionPass, Registry
from fusion_core._torch import inductor
from tests.support.graphs import REFERENCE
from tests.test_matching import norm

POINT = EntryPoint("broken", "broken_plugin", "fusion_core.backends")


def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    """Adds the sum over all ranks to a residual, and norms it."""
    total = r + dist._functional_collectives.all_reduce(x, "sum", dist.group.WORLD)
    return norm(total, w), total


def on_a_rank(folder: str, calls: int = 1) -> str:
    """The verdict of this rank; results are compared with those of the eager model."""
    sys.path.insert(0, folder)
    sys.modules.pop("broken_plugin", None)
    importlib.invalidate_caches()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return whole(Registry.of([REFERENCE, POINT], FusionConfig()), calls)
    finally:
        sys.path.remove(folder)


def whole(registry: Registry, calls: int = 1, caches: bool = False) -> str:
    """Compile with all of Inductor and run; returns the verdict."""
    own = FusionPass(registry=registry).among(None)
    given = [torch.ones(4, 64), torch.ones(4, 64), torch.ones(64)]

    options = {**inductor.with_pass(own, {}), "force_disable_caches": not caches}

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, config_patches=options)  # type: ignore[arg-type]

    for _ in range(calls):
        torch._dynamo.reset()
        try:
            with torch.no_grad():
                found = torch.compile(model, backend=backend)(*given)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a kernel's error is passed on with a note
            return f"error: {type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
    for each, wanted in zip(found, model(*given), strict=True):
        torch.testing.assert_close(each, wanted)
    return "right"
