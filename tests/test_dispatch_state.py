"""The state in which tests run the pass, and `explain` decides, is the one in which Inductor runs it.

A pass that only looks writes down all that decides what an operator gives there, and the graph that it got. Where
nothing behind the passes is wanted, Inductor's own compilation is stopped there.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import _functional_collectives as funcol
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import fusion_core
from fusion_core._torch.inductor import CustomGraphPass, post_grad_only
from tests.corpus.case import norm
from tests.support.graphs import describe

H = 16
State = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_rank", "low_recursion_limit")


class Enough(Exception):
    """Nothing behind the pass is wanted."""


class Recorder(CustomGraphPass):
    """Writes down the state around each graph. With a key it may take part in Inductor's compile cache."""

    def __init__(self, *, stop: bool = True, key: str | None = None) -> None:
        self.states: list[State] = []
        self.stop = stop
        self.key = key

    def __call__(self, graph: fx.Graph) -> None:
        self.states.append(state(graph))
        if self.stop:
            raise Enough

    def uuid(self) -> str | None:
        return self.key

    def __deepcopy__(self, memo: Any) -> "Recorder":
        return self


def state(graph: fx.Graph) -> State:
    virtual: Any = torch._inductor.virtualized
    context, mode = TracingContext.try_get(), virtual.V.fake_mode
    modes = {id(v.fake_mode) for node in graph.nodes if isinstance(v := node.meta.get("val"), FakeTensor)}
    return {
        "dispatch modes": [type(each).__name__ for each in _get_current_dispatch_mode_stack()],
        "function modes": [type(each).__name__ for each in _get_current_function_mode_stack()],
        "functorch": [str(each.key()) for each in torch._C._functorch.get_interpreter_stack() or ()],
        "keys included": str(torch._C._dispatch_tls_local_include_set()),
        "keys excluded": str(torch._C._dispatch_tls_local_exclude_set()),
        "torch functions": torch._C._is_torch_function_enabled(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch._C._is_any_autocast_enabled(), torch.is_autocast_cache_enabled()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "view replay": torch._C._is_view_replay_enabled(),
        "compiling": (torch.compiler.is_compiling(), torch.compiler.is_dynamo_compiling()),
        "lazy graph modules": torch.fx._lazy_graph_module._use_lazy_graph_module_flag,
        "node metadata": torch.fx.traceback.has_preserved_node_meta(),
        "main thread": threading.current_thread() is threading.main_thread(),
        "recursion limit": sys.getrecursionlimit(),
        "virtualized": {
            name: type(held._get_handler(check_poisoned=False)).__name__
            for name, held in vars(virtual).items()
            if isinstance(held, virtual.Virtualized) and held is not virtual._debug
        },
        "fake mode": (type(mode).__name__, mode.allow_non_fake_inputs, mode.static_shapes, mode.cache_enabled),
        "sizes": type(mode.shape_env).__name__,
        "fake mode is the trace's": context is not None and context.fake_mode is mode,
        "fake mode is the graph's": modes == {id(mode)},
        "graph": describe(graph),
    }


@pytest.fixture
def low_recursion_limit() -> Iterator[None]:
    """As in a process that has compiled nothing: Inductor raises it and leaves it so."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1500)
    yield
    sys.setrecursionlimit(before)


class Layer(torch.nn.Module):
    """A layer's end with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down = torch.nn.Linear(H, H, bias=False, dtype=torch.float32)
        self.weight = torch.nn.Parameter(torch.ones(H, dtype=torch.float32))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        reduced = funcol.all_reduce(self.down(x), "sum", torch.distributed.group.WORLD)
        return norm(
            residual + reduced, self.weight, 1e-5
        )  # with a number of the module, Inductor alone has one more input


def given() -> tuple[Tensor, Tensor]:
    return torch.ones(3, H, dtype=torch.float32), torch.ones(3, H, dtype=torch.float32)


def recorded(
    call: Callable[..., Any], around: Callable[[], AbstractContextManager[Any]], key: str | None = None
) -> State:
    """The state in which a compilation runs a pass that the user has set in Inductor's configuration, and stops."""
    recorder = Recorder(key=key)
    torch._dynamo.reset()
    sys.setrecursionlimit(1500)
    stopped = pytest.raises(BackendCompilerFailed, match="Enough")
    with torch._inductor.config.patch(post_grad_custom_post_pass=recorder), around(), stopped:
        call(*given())
    (found,) = recorder.states
    return found


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    with torch.no_grad(), torch.device("cpu"):
        yield


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = (torch.no_grad, torch.inference_mode, autocast, default_device, default_dtype)

REAL: dict[str, dict[str, Any]] = {
    "inductor": {},
    "fusion_core": {"backend": "fusion_core"},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"backend": "fusion_core", "mode": "reduce-overhead"},
}


def nothing(graph: fx.Graph) -> None:
    """Behind the recorder, which the user has set."""


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("around", AROUND)
def test_a_pass_runs_in_the_state_in_which_inductor_runs_it(around: Any, dynamic: bool) -> None:
    layer = Layer()
    cheap = recorded(torch.compile(layer, backend=post_grad_only(nothing), dynamic=dynamic), around)
    assert cheap["dispatch modes"] == []
    assert cheap["fake mode is the graph's"]
    for name, kwargs in REAL.items():
        assert recorded(torch.compile(layer, dynamic=dynamic, **kwargs), around) == cheap, name


def test_so_it_does_where_inductor_has_looked_into_its_cache_first() -> None:
    layer = Layer()
    cheap = recorded(torch.compile(layer, backend=post_grad_only(nothing)), torch.no_grad)
    with torch._inductor.config.patch(fx_graph_cache=True, force_disable_caches=False):
        assert recorded(torch.compile(layer), torch.no_grad, key="a pass that only looks") == cheap


def test_explain_decides_in_it_too() -> None:
    layer = Layer()
    explained = recorded(lambda *given: fusion_core.explain(layer, *given), torch.no_grad)
    assert explained == recorded(torch.compile(layer, backend="fusion_core"), torch.no_grad)


def trained(backend: Any) -> Sequence[State]:
    """The states around a forward graph and the backward one, which autograd has compiled in a thread of its own."""
    recorder = Recorder(stop=False)
    torch._dynamo.reset()
    sys.setrecursionlimit(1500)
    with torch._inductor.config.patch(post_grad_custom_post_pass=recorder):
        torch.compile(Layer(), backend=backend)(*given()).sum().backward()
    return recorder.states


def test_the_graphs_of_training_meet_the_same_state_on_both_paths() -> None:
    forward, backward = trained(post_grad_only(nothing))
    assert forward["gradients"] == (False, False)
    assert [forward, backward] == trained("inductor")
