"""What the workers do: run a model with and without fusion, and bring back plain data."""

import copy
import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.utils import counters

import fusion_core
from fusion_core import FusionConfig, FusionPass
from fusion_core._torch.inductor import post_grad_only
from fusion_core.emit.pairing import PROVENANCE
from fusion_core.testing.compiled import operators
from tests.models import plugins
from tests.models.calls import Setting, exact_logits, generate
from tests.models.loading import load, load_reduced_by_hooks
from tests.support.collectives import reaching_the_group


@dataclass
class Graph:
    """A post-grad graph on both sides of the pass."""

    before: Counter[str]
    survivors: Counter[str]  # nodes of before that are still there
    added: Counter[str]
    unmarked: Counter[str]  # nodes that were added without the name of the strategy that they came from
    report: dict[str, Any]


@dataclass
class Outcome:
    """What came of one setting."""

    graphs: list[Graph] = field(default_factory=list)
    compiled_after_call: list[int] = field(default_factory=list)
    fused: Counter[str] = field(default_factory=Counter)  # what reached the process group
    unfused: Counter[str] = field(default_factory=Counter)
    fused_error: float = float("nan")
    unfused_error: float = float("nan")
    fused_rms: float = float("nan")  # root of the mean of squares of all errors
    unfused_rms: float = float("nan")
    magnitude: float = float("nan")
    finite: bool = False
    dead_rows: int = -1
    seconds: float = 0.0


def watched(run: Callable[[fx.Graph], None], graph: fx.Graph) -> Graph:
    """Run a pass on a graph and say what became of the nodes."""
    old = list(graph.nodes)
    run(graph)
    new = list(graph.nodes)
    added = [node for node in new if node not in set(old)]
    report = fusion_core.last_report()
    assert report is not None
    return Graph(
        targets(old),
        targets([node for node in new if node in set(old)]),
        targets(added),
        targets([node for node in added if PROVENANCE not in node.meta]),
        report.to_dict(),
    )


def targets(nodes: list[fx.Node]) -> Counter[str]:
    """Operators, and those that ours run in a group of several ranks."""
    called = [node for node in nodes if node.op == "call_function"]
    return Counter(each for node in called for each in operators(node))


def survey(path: Path, dtype: torch.dtype, settings: list[Setting], backend: str = "reference") -> dict[str, Outcome]:
    """Every setting up to Inductor's post-grad graph, which then runs eagerly, with and without fusion."""
    return {str(setting): _survey(path, dtype, setting, backend) for setting in settings}


def _survey(path: Path, dtype: torch.dtype, setting: Setting, backend: str) -> Outcome:
    started = time.process_time()
    torch._dynamo.reset()
    own = (
        plugins.pass_with(backend)
        if hasattr(plugins, backend)
        else FusionPass(FusionConfig(order=(backend,), merge=True))
    )
    model, outcome = load(path, dtype), Outcome()
    without: list[tuple[fx.GraphModule, fx.Graph]] = []

    def look(graph: fx.Graph) -> None:
        """One compilation for both runs: what differs is the pass alone."""
        without.append((graph.owning_module, copy.deepcopy(graph)))
        outcome.graphs.append(watched(own, graph))

    def count() -> None:
        outcome.compiled_after_call.append(len(outcome.graphs))

    compiled = setting.compile(model, post_grad_only(look))
    fused = generate(model, compiled, setting, count)
    outcome.fused = reaching_the_group(lambda: generate(model, compiled, setting, count))
    for module, graph in without:
        module.graph = graph
    unfused: list[torch.Tensor] = []
    outcome.unfused = reaching_the_group(lambda: unfused.extend(generate(model, compiled, setting, count)))
    compare(outcome, fused, unfused, exact_logits(path, dtype, setting))
    outcome.seconds = time.process_time() - started
    return outcome


def compare(
    outcome: Outcome, fused: list[torch.Tensor], unfused: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    """The largest errors over all calls."""
    outcome.fused_error = max(float((a.double() - b).abs().max()) for a, b in zip(fused, exact, strict=True))
    outcome.unfused_error = max(float((a.double() - b).abs().max()) for a, b in zip(unfused, exact, strict=True))
    outcome.fused_rms, outcome.unfused_rms = _rms(fused, exact), _rms(unfused, exact)
    outcome.magnitude = min(float(each.abs().amax(-1).mean()) for each in exact)
    outcome.finite = all(bool(each.isfinite().all()) for each in (*fused, *unfused, *exact))
    outcome.dead_rows = sum(int((each.abs().amax(-1) == 0).sum()) for each in (*fused, *unfused, *exact))


def _rms(logits: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    errors = torch.cat([(a.double() - b).flatten() for a, b in zip(logits, exact, strict=True)])
    return float(errors.square().mean().sqrt())


@dataclass
class Start:
    """One process start of a program that compiles a model by ``backend="fusion_core"``, all of Inductor included."""

    outcome: Outcome
    logits: list[torch.Tensor]
    origin: str
    text: str
    sites: list[dict[str, Any]]
    passes: int  # how often the pass ran
    cache_hits: dict[str, int]


def start(
    path: Path,
    dtype: torch.dtype,
    setting: Setting,
    by_hooks: bool = False,
) -> Start:
    """Compile by the public backend and run, and the same without fusion_core."""
    torch._dynamo.reset()
    counters.clear()
    model = load_reduced_by_hooks(path, dtype) if by_hooks else load(path, dtype)
    outcome, original = Outcome(), FusionPass.__call__

    def call(own: FusionPass, graph: fx.Graph) -> None:
        outcome.graphs.append(watched(functools.partial(original, own), graph))

    with mock.patch.object(FusionPass, "__call__", call):
        compiled = setting.compile(model, "fusion_core")
        fused = generate(
            model, compiled, setting, lambda: outcome.compiled_after_call.append(counters["stats"]["unique_graphs"])
        )
    hits = {
        "fx graph": counters["inductor"]["fxgraph_cache_hit"],
        "autograd": counters["aot_autograd"]["autograd_cache_hit"],
    }
    report = fusion_core.last_report()
    assert report is not None
    outcome.fused = reaching_the_group(lambda: generate(model, compiled, setting))
    if not by_hooks:
        torch._dynamo.reset()
        plain = setting.compile(model, "inductor")
        unfused = generate(model, plain, setting)
        outcome.unfused = reaching_the_group(lambda: generate(model, plain, setting))
        compare(outcome, fused, unfused, exact_logits(path, dtype, setting))
    sites = report.to_dict()["sites"]
    return Start(outcome, fused, report.origin, str(report), sites, len(outcome.graphs), hits)
