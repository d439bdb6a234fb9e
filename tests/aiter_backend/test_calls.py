"""Every call of AITER that the backend can make, against the signatures of every release that it supports.

What is called is recorded from a communicator that takes anything, so that only the releases judge it.
"""

import ast
import inspect
import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

import fusion_aiter
from fusion_aiter import creation, library
from fusion_aiter.availability import CALLS
from fusion_aiter.calls import call
from fusion_aiter.communicators import Aiter
from fusion_aiter.kernels import KERNELS, Form, allocate
from fusion_aiter.source import Call
from tests.aiter_backend import releases

X = torch.ones(4, 512, dtype=torch.bfloat16)
WEIGHT = torch.ones(512, dtype=torch.bfloat16)
EPS = 1e-6


@dataclass(frozen=True)
class Made:
    """One recorded call."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(self, release: str) -> inspect.BoundArguments:
        """As the release's method takes it.

        Raises:
            TypeError: where it does not.
        """
        signature = releases.signature(f"CustomAllreduce.{self.method}", release)
        assert signature is not None, f"{release} has no CustomAllreduce.{self.method}"
        return signature.bind(self, *self.args, **self.kwargs)


class Recorder:
    """A `CustomAllreduce` that takes anything and gives ``gives``."""

    made: ClassVar[list[Made]] = []
    gives: ClassVar[Any] = None
    disabled = False
    device = X.device

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Recorder.made.append(Made("__init__", args, kwargs))

    def __getattr__(self, method: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            Recorder.made.append(Made(method, args, kwargs))
            return Recorder.gives

        return record


@pytest.fixture(autouse=True)
def _nothing_is_recorded_yet(monkeypatch):
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(Recorder, "gives", None)


def kernels_calls() -> list[Made]:
    """Every kernel in every form, in one stage and in two, with and without Gemma's bias of the weight."""
    own = Recorder()
    Recorder.made.clear()
    biases, flags = (0.0, 1.0), (False, True)
    for kernel, bias, one_stage, transposed, size in itertools.product(KERNELS, biases, flags, flags, (64, 128)):
        if bias and not kernel.gemma:
            continue
        residual, weight = (X, WEIGHT) if kernel.norms else (None, None)
        form = Form(torch.float8_e4m3fn, size, transposed)
        assert call(kernel, own, X, residual, weight, EPS, bias, form, one_stage=one_stage) is None
    return list(Recorder.made)


def life() -> list[Made]:
    """A communicator is made, asked about sizes, and given back."""
    module = SimpleNamespace(CustomAllreduce=Recorder, IPCBufferPool=SimpleNamespace(_pool_seq=0))
    replaced = {
        "_warn_of_runtime": lambda: None,
        "_waits_of_the_default_store": lambda seconds: nullcontext(),
        "Agreement": lambda *given: SimpleNamespace(outcome=lambda problem: None),
    }
    Recorder.made.clear()
    with (
        mock.patch.multiple(creation, **replaced),
        mock.patch.multiple(
            creation.dist,
            get_process_group_ranks=lambda group: [0, 1],
            destroy_process_group=lambda group: None,
        ),
        mock.patch.object(creation, "_gloo_group", return_value="own group"),
        mock.patch.object(library, "module", return_value=module),
    ):
        made = creation.create(
            "the model's group", X.device, 1 << 20, [{"made": 0, "token": "a"}, {"made": 0, "token": "b"}]
        )
        assert Aiter().takes(made, SimpleNamespace(x=X)) is not None  # the recorder says no
        creation.free(made)
    return list(Recorder.made)


def everything() -> list[Made]:
    return [*kernels_calls(), *life()]


@pytest.mark.parametrize("release", releases.SUPPORTED)
def test_every_call_binds_to_every_supported_release(release):
    made = everything()
    assert {each.method for each in made} == CALLS.keys()
    for each in made:
        each.bind(release)


def test_calls_are_what_availability_asks_the_source_for():
    """No more, which would go unchecked, and no less, which would refuse an AITER that works."""
    used: dict[str, tuple[set[int], set[str]]] = {}
    for each in everything():
        positional, keywords = used.setdefault(each.method, (set(), set()))
        positional.add(len(each.args))
        keywords.update(each.kwargs)
    asked = {name: ({each.positional}, set(each.keywords)) for name, each in CALLS.items()}
    assert used == asked
    assert all(len(set(each.keywords)) == len(each.keywords) for each in CALLS.values())
    assert all(isinstance(each, Call) for each in CALLS.values())


def test_no_other_method_of_a_communicator_is_called_anywhere():
    """What `everything` drives is everything: by the text of the package."""
    called = set()
    for path in Path(fusion_aiter.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
                if name == "communicator":
                    called.add(node.func.attr)
    assert called == CALLS.keys() - {"__init__"}


@pytest.mark.parametrize(
    ("release", "lacking"),
    [
        ("v0.1.19.post1", {"transpose_scale"}),
        ("v0.1.18", {"transpose_scale"}),
        ("v0.1.17", {"emit_bf16"}),
        ("v0.1.16", {"emit_bf16", "gemma_norm", "transpose_scale"}),
    ],
)
def test_a_release_without_a_keyword_does_not_bind(release, lacking):
    """So that the check can fail; each of these keywords is the reason why the release is not supported."""
    found = set()
    for each in kernels_calls():
        taken = releases.signature(f"CustomAllreduce.{each.method}", release).parameters
        missing = each.kwargs.keys() - taken
        found |= missing
        if missing:
            with pytest.raises(TypeError, match=f"unexpected keyword argument '({'|'.join(missing)})'"):
                each.bind(release)
        else:
            each.bind(release)
    assert found == lacking


def test_what_is_never_asked_for():
    """Registered inputs, the lossy all-reduce, and the constructor's registering of a capture's inputs."""
    made = everything()
    fixed = {
        "registered": False,
        "registered_input": False,
        "open_fp8_quant": False,
        "enable_register_for_capturing": False,
    }
    seen = {name: [each.kwargs[name] for each in made if name in each.kwargs] for name in fixed}
    assert all(seen.values())
    assert {name: set(values) for name, values in seen.items()} == {name: {value} for name, value in fixed.items()}


def test_every_flag_follows_its_argument():
    """Each of a kernel's keywords, by the form that it was called with."""
    own = Recorder()
    for kernel in KERNELS:
        for bias, one_stage, transposed in itertools.product((0.0, 1.0), (False, True), (False, True)):
            if not kernel.norms or (bias and not kernel.gemma):
                continue
            Recorder.made.clear()
            form = Form(torch.float8_e4m3fnuz, 64, transposed)
            call(kernel, own, X, X + 1, WEIGHT, EPS, bias, form, one_stage=one_stage)
            (made,) = Recorder.made
            tensors = {name: made.kwargs.pop(name) for name in ("inp", "res_inp", "w")}
            assert tensors["inp"] is X
            assert tensors["w"] is WEIGHT
            assert (tensors["res_inp"] == 2).all()
            expected: dict[str, Any] = {"eps": EPS, "registered": False, "use_1stage": one_stage}
            if kernel.quantization:
                expected["emit_bf16"] = kernel.norm_out
            if kernel.quantization == "token_fp8":
                expected["post_per_token_quant"] = True
            if kernel.gemma:
                expected["gemma_norm"] = bias == 1.0
            if kernel.quantization == "group_fp8":
                expected |= {"group_size": 64, "transpose_scale": transposed}
            assert (made.method, made.args, made.kwargs) == (kernel.method, (), expected)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_results_have_their_names_by_aiter_s_order(kernel):
    """AITER gives the residual behind the codes and before the scale, whatever the operator's own order is."""
    form = Form()
    results = allocate(kernel, X, form)
    if not kernel.norms:
        Recorder.gives = results[kernel.outputs[0]]
    elif not kernel.quantization:
        Recorder.gives = (results["normed"], results[kernel.outputs[-1]])
    else:
        Recorder.gives = (results["quantized"], results[kernel.outputs[-1]], results["scale"])
        Recorder.gives += (results["normed"],) if kernel.norm_out else ()
    found = call(kernel, Recorder(), X, X, WEIGHT, EPS, 0.0, form, one_stage=False)
    assert found is not None
    assert found.keys() == results.keys() == set(kernel.outputs)
    assert all(found[name] is results[name] for name in results)
