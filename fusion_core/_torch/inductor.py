"""Inductor: how it compiles a graph, the passes that it runs, and what it takes from its cache."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from fusion_core._torch.dynamo import compiling
from fusion_core._torch.epsilons import fix_epsilons
from fusion_core._torch.tensors import FakeTensorMode

__all__ = [
    "CustomGraphPass",
    "cache_dir",
    "caches_enabled",
    "compile_graph",
    "compile_rows",
    "decompositions",
    "label",
    "mode_options",
    "post_grad_only",
    "reset_cudagraphs",
    "taking",
    "with_pass",
]

POST_PASS = "post_grad_custom_post_pass"
LABEL = "fusion_core_report_"
"""The prefix of `label`'s names among Inductor's counters."""

ROWS_IN_MIND = 1021
"""Rows of the example for a kernel that takes any number of rows: a kernel laid out for few would be slow for many. A
prime, so that Inductor concludes nothing from its divisors."""


class NotCached(str):
    """A key for a graph that must not come from any cache.

    It is false, by which Inductor asks no cache. It is also another text each time: what hashes a key without asking,
    as vLLM's pass manager does, would share one graph between all passes whose key is None.
    """

    __slots__ = ()

    def __new__(cls, text: str | None = None) -> NotCached:
        return super().__new__(cls, f"not cached {secrets.token_hex(16)}" if text is None else text)

    def __bool__(self) -> bool:
        return False


class PassSequence(CustomGraphPass):
    """Several passes as one: those that a user had already set, then ours."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        """Run every pass on the graph, in order."""
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        """The uuids of all passes; `NotCached` if one of them has none."""
        uuids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return tuple(uuids) if all(uuids) else NotCached()

    def __deepcopy__(self, memo: dict[int, Any]) -> PassSequence:
        return self


def with_pass(own: CustomGraphPass, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor options with our pass after any that is already set, in them or in Inductor's configuration."""
    existing = options.get(POST_PASS, getattr(inductor_config, POST_PASS))
    before = existing if isinstance(existing, list | tuple) else () if existing is None else (existing,)
    before = tuple(each for each in before if not isinstance(each, type(own)))
    return {**options, POST_PASS: PassSequence((*before, own)) if before else own}


def mode_options(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """The Inductor options that ``torch.compile(mode=..., options=...)`` sets.

    Raises:
        RuntimeError: torch's own, for an unknown mode or option.
    """
    wrapper = torch._TorchCompileInductorWrapper(mode, options, dynamic=None)
    return dict(wrapper.config)


def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
    """Compile a Dynamo graph with Inductor under these options."""
    from torch._inductor.compile_fx import compile_fx

    fix_epsilons(graph_module)
    with compiling(graph_module):
        return compile_fx(graph_module, list(inputs), config_patches=options)


def compile_rows(
    function: Callable[..., tuple[torch.Tensor, ...]], tensors: Sequence[torch.Tensor], rows: Sequence[int]
) -> Callable[..., Any]:
    """Compile a function of tensors with Inductor for any number of rows, without Dynamo and its guards.

    Args:
        function: A traceable function from the tensors to a tuple of tensors.
        tensors: Examples; their values are not used.
        rows: Indices of the tensors whose sizes, except the last, may change per call; equal for all of them.
    """
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes: list[Any] = []
    like: torch.Tensor | None = None
    for place, tensor in enumerate(tensors):
        if place in rows and like is not None:
            with mode:
                fakes.append(torch.empty_like(like, dtype=tensor.dtype))
            continue
        sizes = [DimDynamic.DYNAMIC] * (tensor.dim() - 1) if place in rows else [DimDynamic.STATIC] * (tensor.dim() - 1)
        example = tensor
        if place in rows and tensor.dim() > 1:  # a size of 1 would be taken for a constant
            lead = (ROWS_IN_MIND, *[3] * (tensor.dim() - 2))
            example = tensor.new_empty((*lead, tensor.shape[-1]))
        context: Any = StatelessSymbolicContext(dynamic_sizes=[*sizes, *[DimDynamic.STATIC] * min(tensor.dim(), 1)])
        fakes.append(mode.from_tensor(example, symbolic_context=context))
        like = fakes[-1] if place in rows else like
    with torch.no_grad(), mode:
        traced = make_fx(function)(*fakes)
    options = {"triton.cudagraphs": False, POST_PASS: None}
    compiled: Callable[..., Any] = standalone_compile(
        traced, fakes, dynamic_shapes="from_graph", options={"config_patches": options}
    )
    return compiled


def post_grad_only(own: Callable[[fx.Graph], None]) -> Callable[[fx.GraphModule, Sequence[Any]], Any]:
    """A Dynamo backend that stops after Inductor's post-grad passes and runs the graph eagerly: no code generation."""
    from torch._inductor.compile_fx import compile_fx

    def inner(graph_module: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return _post_grad(graph_module, inputs, bool(kwargs.get("is_inference")))

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        fix_epsilons(graph_module)
        with compiling(graph_module):
            return compile_fx(graph_module, list(inputs), inner_compile=inner, config_patches=with_pass(own, {}))  # type: ignore[arg-type]

    return backend


def _post_grad(graph_module: fx.GraphModule, inputs: Sequence[Any], is_inference: bool) -> Any:
    """Do what ``compile_fx_inner`` does up to the end of its post-grad passes, under the same modes."""
    from torch._dynamo import config as dynamo_config
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop, get_cuda_device_context
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.virtualized import V
    from torch.fx._lazy_graph_module import _use_lazy_graph_module
    from torch.utils._python_dispatch import _disable_current_modes

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 2000))
    # Inductor's fake mode is set there and not entered: an operator that creates a tensor makes a real one
    with _disable_current_modes(), _use_lazy_graph_module(dynamo_config.use_lazy_graph_module):
        view_to_reshape(graph_module)
        with torch.no_grad():
            fake_mode = fake_tensor_prop(graph_module, list(inputs))
        with V.set_fake_mode(fake_mode), get_cuda_device_context(graph_module):
            _recursive_post_grad_passes(graph_module, is_inference=is_inference)
    graph_module.recompile()

    def run(arguments: list[Any]) -> Any:
        given = list(arguments)
        arguments.clear()
        return graph_module(*given)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions that Inductor applies before its post-grad passes."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def cache_dir() -> Path:
    """Where Inductor keeps compiled graphs."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as directory

    return Path(directory())


def caches_enabled() -> bool:
    """Whether Inductor caches the graph that it is compiling, under the options of that graph."""
    return bool(inductor_config.fx_graph_cache) and not inductor_config.force_disable_caches


def label(name: str) -> None:
    """Give a name to the graph that Inductor is compiling. Inductor caches the name with the graph."""
    # Inductor caches what a compilation adds to these counters, and adds it again at a cache hit
    counters["inductor"][LABEL + name] += 1


@dataclass
class Taken:
    """What Inductor took from its cache.

    Attributes:
        hits: The number of graphs.
        labels: Their names, and those of graphs that were compiled.
    """

    hits: int = 0
    labels: tuple[str, ...] = ()


@contextmanager
def taking() -> Iterator[Taken]:
    """What Inductor takes from its cache within the block; complete when the block has ended."""
    taken = Taken()
    hits, before = _hits(), _labels()
    try:
        yield taken
    finally:
        taken.hits = _hits() - hits
        taken.labels = tuple(name for name in _labels() if name not in before)
        for name in taken.labels:  # no other code reads them
            del counters["inductor"][LABEL + name]


def _hits() -> int:
    return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]


def _labels() -> list[str]:
    return [name.removeprefix(LABEL) for name in counters["inductor"] if name.startswith(LABEL)]


def reset_cudagraphs() -> None:
    """Forget recorded CUDA graphs, as ``torch._dynamo.reset`` requires of a backend."""
    if inductor_config.triton.cudagraphs or torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
