"""What the workers of `test_untouched` do: describe the post-grad graphs where nothing may be chosen."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fusion_core import FusionConfig, FusionPass
from fusion_core._torch.inductor import post_grad_only
from tests.models import plugins
from tests.models.calls import Setting, generate
from tests.models.loading import load


def _nothing(graph: fx.Graph) -> None:
    pass


def described(path: Path, dtype: torch.dtype, setting: Setting) -> dict[str, list[str]]:
    """The post-grad graphs without fusion_core, and with it where nothing may be chosen: a line a node."""
    torch._dynamo.reset()
    passes: dict[str, Callable[[fx.Graph], None]] = {
        "first": _nothing,  # Dynamo's symbols are looked at for the first time, which shifts the numbers in names
        "without fusion_core": _nothing,
        "limit=0": FusionPass(FusionConfig(limit=0)),
        "order=()": FusionPass(FusionConfig(order=())),
        "every backend refuses": plugins.pass_with("refusing"),
        "reference": FusionPass(FusionConfig(order=("reference",))),
    }
    found: dict[str, list[str]] = {name: [] for name in passes}

    def each(graph_module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for name, own in passes.items():

            def look(graph: fx.Graph, name: str = name, own: Callable[[fx.Graph], None] = own) -> None:
                own(graph)
                found[name].extend(map(describe, graph.nodes))

            runnable = post_grad_only(look)(copy.deepcopy(graph_module), inputs)
        return runnable  # type: ignore[no-any-return]

    model = load(path, dtype)
    generate(model, torch.compile(model, backend=each, fullgraph=True), setting)
    return found


def describe(node: fx.Node) -> str:
    """All that a later pass of Inductor reads of a node."""
    value = node.meta.get("val")
    metas = [
        f"{v.dtype}{tuple(v.shape)}{v.stride()}{v.device}" if isinstance(v, torch.Tensor) else type(v).__name__
        for v in (value if isinstance(value, tuple | list) else (value,))
    ]
    return f"{node.op} {node.name} = {node.target}{node.args}{node.kwargs} {metas} {sorted(node.meta)}"
