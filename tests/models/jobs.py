"""What the workers do: load a model under tensor parallelism, run it with and without fusion, bring back plain data."""

import copy
import functools
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import fx
from torch._dynamo.utils import counters
from torch.distributed import _functional_collectives as funcol
from torch.overrides import TorchFunctionMode

import fusion_core
from fusion_core import FusionConfig, FusionPass
from fusion_core._inductor import post_grad_only
from fusion_core.emit.pairing import PROVENANCE
from fusion_core.testing.compiled import operators
from tests.models import plugins
from tests.models.architectures import VOCABULARY
from tests.support.collectives import reaching_the_group

BATCH, LENGTH, OTHER_LENGTH = 2, 8, 11


@dataclass(frozen=True)
class Setting:
    """One way in which a user runs a model."""

    dynamic: bool
    cached: bool
    mode: str  # of torch: "no_grad" or "inference_mode"

    def __str__(self) -> str:
        return "-".join(("dynamic" if self.dynamic else "static", "cache" if self.cached else "nocache", self.mode))


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


def exact_logits(path: Path, dtype: torch.dtype, setting: Setting) -> list[torch.Tensor]:
    model = oracle(path, dtype)
    with AllFloat64():
        return generate(model, model, setting)


def tokens(seed: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def generate(
    model: Any, call: Callable[..., Any], setting: Setting, after_call: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """Logits of each call that a setting makes."""
    prompt, others = tokens(0, LENGTH), [tokens(1, 1), tokens(2, 1)] if setting.cached else [tokens(1, OTHER_LENGTH)]
    logits = []

    def step(ids: torch.Tensor, **kwargs: Any) -> None:
        logits.append(call(ids, **kwargs).logits.detach().clone())
        after_call()

    with getattr(torch, setting.mode)():
        if setting.dynamic:
            torch._dynamo.mark_dynamic(prompt, 1)
        if not setting.cached:
            step(prompt, use_cache=False)
            if setting.dynamic:
                torch._dynamo.mark_dynamic(others[0], 1)
                step(others[0], use_cache=False)
            return logits
        cache = transformers.DynamicCache(config=model.config)
        step(prompt, past_key_values=cache, use_cache=True)
        # A static run would compile the second step anew, for a cache that is one longer.
        for ids in others if setting.dynamic else others[:1]:
            if setting.dynamic:
                _may_grow(cache)
            step(ids, past_key_values=cache, use_cache=True)
    return logits


def _may_grow(cache: transformers.DynamicCache) -> None:
    """Tell Dynamo that the next step's cache is longer."""
    for layer in cache.layers:
        # The first step leaves transposed views and later ones do not: other strides would be another graph.
        layer.keys = layer.keys.clone(memory_format=torch.contiguous_format)
        layer.values = layer.values.clone(memory_format=torch.contiguous_format)
        torch._dynamo.mark_dynamic(layer.keys, 2)
        torch._dynamo.mark_dynamic(layer.values, 2)


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

    compiled = torch.compile(model, backend=post_grad_only(look), fullgraph=True)
    fused = generate(model, compiled, setting, count)
    outcome.fused = reaching_the_group(lambda: generate(model, compiled, setting, count))
    for module, graph in without:
        module.graph = graph
    unfused: list[torch.Tensor] = []
    outcome.unfused = reaching_the_group(lambda: unfused.extend(generate(model, compiled, setting, count)))
    compare(outcome, fused, unfused, exact_logits(path, dtype, setting))
    outcome.seconds = time.process_time() - started
    return outcome


def _nothing(graph: fx.Graph) -> None:
    pass


def compare(
    outcome: Outcome, fused: list[torch.Tensor], unfused: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    """The largest errors over all calls."""
    outcome.fused_error = max(float((a.double() - b).abs().max()) for a, b in zip(fused, exact, strict=True))
    outcome.unfused_error = max(float((a.double() - b).abs().max()) for a, b in zip(unfused, exact, strict=True))
    outcome.magnitude = min(float(each.abs().amax(-1).mean()) for each in exact)
    outcome.finite = all(bool(each.isfinite().all()) for each in (*fused, *unfused, *exact))
    outcome.dead_rows = sum(int((each.abs().amax(-1) == 0).sum()) for each in (*fused, *unfused, *exact))


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
        compiled = torch.compile(model, backend="fusion_core", fullgraph=True)
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
        plain = torch.compile(model, fullgraph=True)
        unfused = generate(model, plain, setting)
        outcome.unfused = reaching_the_group(lambda: generate(model, plain, setting))
        compare(outcome, fused, unfused, exact_logits(path, dtype, setting))
    sites = report.to_dict()["sites"]
    return Start(outcome, fused, report.origin, str(report), sites, len(outcome.graphs), hits)


@dataclass
class Training:
    """Gradients of one step by name, and what was decided in the graphs of its forward and backward."""

    fused: dict[str, torch.Tensor]
    unfused: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]
    reports: list[dict[str, Any]]
    losses: tuple[float, float, float]
    calls: tuple[Counter[str], Counter[str]]


def train(path: Path) -> Training:
    """One training step by `fusion_core.compile` with merging, by Inductor alone, and in float64 on one rank."""
    torch._dynamo.reset()
    model = load(path, torch.float32).train()
    before = len(fusion_core.reports())

    def step(which: Any, call: Callable[..., Any]) -> tuple[dict[str, torch.Tensor], float]:
        which.zero_grad()
        loss = call(tokens(0, LENGTH), labels=tokens(0, LENGTH), use_cache=False).loss
        loss.backward()
        return {name: _whole(p.grad) for name, p in which.named_parameters()}, float(loss.detach())

    try:
        compiled = fusion_core.compile(model, FusionConfig(merge=True), fullgraph=True)
        fused, fused_loss = step(model, compiled)
        fused_calls = reaching_the_group(lambda: step(model, compiled))
        reports = [report.to_dict() for report in fusion_core.reports()[before:]]
        torch._dynamo.reset()
        plain = torch.compile(model, fullgraph=True)
        unfused, unfused_loss = step(model, plain)
        unfused_calls = reaching_the_group(lambda: step(model, plain))
    finally:
        model.zero_grad()
        model.eval()
    full = oracle(path, torch.float32)
    with AllFloat64():
        exact, exact_loss = step(full, full)
    return Training(
        fused, unfused, exact, reports, (fused_loss, unfused_loss, exact_loss), (fused_calls, unfused_calls)
    )


def _whole(gradient: Any) -> torch.Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).detach().clone()


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
