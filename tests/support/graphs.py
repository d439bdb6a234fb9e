"""Compile a function with the pass, up to Inductor's post-grad graph, and record the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_core import FusionConfig, FusionPass, Registry, Report, SiteReport
from fusion_core._torch import inductor
from fusion_core.lift.collectives import TARGETS

REFERENCE = EntryPoint("reference", "fusion_reference", "fusion_core.backends")


def registry(*points: EntryPoint, config: FusionConfig | None = None) -> Registry:
    """A registry of exactly these entry points."""
    return Registry.of(points, FusionConfig() if config is None else config)


def plugin(monkeypatch: Any, name: str, **hooks: Any) -> EntryPoint:
    """An entry point to a module with these attributes; functions are marked as hooks unless they already are."""
    import sys
    from types import ModuleType

    from fusion_core import hookimpl

    module = ModuleType(f"plugin_{name}")
    for key, value in hooks.items():
        setattr(module, key, hookimpl(value) if callable(value) and key.startswith("fusion_") else value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EntryPoint(name, module.__name__, "fusion_core.backends")


def describe(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as comparable values: for each node its name, arguments, shape and dtype."""

    def plain(argument: Any) -> Any:
        return argument.name if isinstance(argument, fx.Node) else argument

    def meta(value: Any) -> Any:
        return (
            (tuple(map(str, value.shape)), value.dtype, str(value.stride()))
            if isinstance(value, torch.Tensor)
            else str(value)
        )

    return [
        (n.op, n.name, n.target, str(fx.map_arg((n.args, n.kwargs), plain)), meta(n.meta.get("val")))
        for n in graph.nodes
        if n.op != "output"
    ] + [("output", str(graph.output_node().args))]


@dataclass
class Fused:
    """What the pass did to the graphs of one function.

    ``before`` and ``after`` describe each graph; ``graphs`` are the rewritten ones.
    """

    results: Any = None
    reports: list[Report] = field(default_factory=list)
    before: list[list[tuple[Any, ...]]] = field(default_factory=list)
    after: list[list[tuple[Any, ...]]] = field(default_factory=list)
    graphs: list[fx.Graph] = field(default_factory=list)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        return tuple(site for report in self.reports for site in report.sites)

    @property
    def site(self) -> SiteReport:
        assert len(self.sites) == 1, [site.node for site in self.sites]
        return self.sites[0]

    def targets(self, graph: int = 0) -> list[Any]:
        return [node.target for node in self.graphs[graph].nodes if node.op == "call_function"]

    def collectives(self, described: Iterable[tuple[Any, ...]]) -> int:
        return sum(row[2] in TARGETS for row in described if row[0] == "call_function")


def fuse(
    function: Callable[..., Any],
    *args: Any,
    config: FusionConfig | None = None,
    using: Registry | None = None,
    dynamic: bool = False,
    grad: bool = False,
) -> Fused:
    """Compile and run a function with the pass, without Inductor's steps after the post-grad passes."""
    fused = Fused()
    own = FusionPass(config) if using is None else FusionPass(registry=using)

    class Look(inductor.CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            fused.before.append(describe(graph))
            fused.reports.append(own.run(graph))
            graph.lint()
            fused.after.append(describe(graph))
            fused.graphs.append(graph)

        def uuid(self) -> None:
            return None

        def __deepcopy__(self, memo: Any) -> Look:
            return self

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=inductor.post_grad_only(Look()), dynamic=dynamic, fullgraph=True)
    with torch.set_grad_enabled(grad):
        fused.results = compiled(*args)
        if grad:
            results = fused.results if isinstance(fused.results, tuple) else (fused.results,)
            torch.autograd.backward([r.sum() for r in results if r.requires_grad])
    return fused


def graph_of(function: Any, *shapes: tuple[int, ...]) -> tuple[fx.Graph, list[torch.Tensor]]:
    """A graph as operators were called, with what functionalisation would have taken out: in-place collectives, writes."""
    mode = FakeTensorMode()
    with mode:
        inputs = [torch.empty(shape) for shape in shapes]
    return make_fx(function)(*inputs).graph, inputs
