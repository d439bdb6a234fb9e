"""What the workers of the GPU tests run: FlashInfer's real kernels over NCCL."""

from __future__ import annotations

import gc
import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce

import fusion_core
import fusion_flashinfer
from fusion_core import Device, FusionConfig
from fusion_core.fallback import fallen_back
from fusion_flashinfer.kernels import KERNELS
from fusion_flashinfer.workspaces import WORKSPACES
from tests.flashinfer_backend.forms import faster
from tests.flashinfer_backend.one_call import BY_NAME, inputs, run
from tests.gpu import llama

ADD = "all_reduce_add_rms_norm"
MIB = 1 << 20
ALONE = FusionConfig(order=("flashinfer",), table="none")
"""FlashInfer's strategies by what they declare, whatever was measured of others."""
PATHS: dict[str, dict[str, Any]] = {"one-shot": {}, "two-shot": {"two_shot": True}, "unfused": {"max_tokens": 0}}
"""What operators take, behind the group, to run one way whatever the size."""


def anew() -> None:
    """Forget the workspaces of earlier tests."""
    WORKSPACES.release()


def world() -> str:
    """The default group's name."""
    return str(dist.group.WORLD.group_name)  # type: ignore[union-attr]


def failures() -> list[str]:
    """What the workspaces of this process say that went wrong."""
    return [f"{each.subject}: {each.state}" for each in WORKSPACES.status() if each.state != "in use"]


def grid(path: str, tokens: list[int], hidden: list[int], pdl: bool = False) -> tuple[int, list[str]]:
    """Every kernel that a Hopper GPU has, at every size: how many calls, and which are off."""
    anew()
    calls, off = 0, []
    for kernel in KERNELS:
        if kernel.quantization == "nvfp4":
            continue
        dtypes = [torch.bfloat16, torch.float16] + ([] if kernel.quantization else [torch.float32])
        for dtype in dtypes:
            for n in hidden:
                if kernel.quantization == "group_fp8" and n % 128:
                    continue
                for rows in tokens:
                    bias = float(calls % 2)
                    distance = run(kernel.name, rows, n, dtype, bias=bias, pdl=pdl, **PATHS[path])
                    calls += 1
                    if not distance <= 1:
                        off.append(f"{kernel.name} {rows}x{n} {dtype} bias {bias}: {distance}")
    return calls, off + failures()


def in_parts(tokens: int, hidden: int) -> list[str]:
    """Every kernel on more rows than one launch takes: which are off."""
    anew()
    names = [kernel.name for kernel in KERNELS if kernel.quantization != "nvfp4"]
    paths = [(name, two_shot) for name in names for two_shot in (False, True)]
    distances = {path: run(path[0], tokens, hidden, two_shot=path[1]) for path in paths}
    return [f"{path}: {distance}" for path, distance in distances.items() if not distance <= 1] + failures()


def other_bits_in_another_batch(tokens: list[int], hidden: int) -> list[int]:
    """Numbers of rows whose one-shot sum has other bits than among the most of them."""
    anew()
    most = max(tokens)
    x = inputs(BY_NAME["all_reduce"], most, hidden, torch.bfloat16, 0.0, dist.get_rank())["x"]
    whole = torch.ops.fusion_flashinfer.all_reduce(x, world(), always=True)
    sums = {n: torch.ops.fusion_flashinfer.all_reduce(x[most - n :], world(), 100, always=True) for n in tokens}
    assert failures() == []
    return [n for n, found in sums.items() if not torch.equal(found, whole[most - n :])]


def given(tokens: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and weight of one call."""
    found = inputs(BY_NAME[ADD], tokens, hidden, torch.bfloat16, 0.0, dist.get_rank())
    return found["x"], found["residual"], found["weight"]


def chain(x: Tensor, residual: Tensor, weight: Tensor, path: str = "one-shot") -> tuple[Tensor, Tensor]:
    """Three sites in a row, the third without a residual of its own."""
    operators, where = torch.ops.fusion_flashinfer, PATHS[path]
    for _ in range(2):
        x, residual = operators.all_reduce_add_rms_norm(x, residual, weight, 1e-5, 0.0, world(), **where)
    x, reduced = operators.all_reduce_rms_norm(x, weight, 1e-5, 0.0, world(), **where)
    return x, residual + reduced


def captured(
    arguments: tuple[Tensor, Tensor, Tensor], path: str = "one-shot"
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """`chain` as a CUDA graph, warmed up first as one must."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        chain(*arguments, path)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(*arguments, path)
    return graph, results


def replays(count: int, tokens: int, hidden: int, path: str) -> int:
    """Replays of a captured chain, its inputs changing, whose results are not bit for bit those of eager calls."""
    anew()
    arguments = given(tokens, hidden)
    graph, results = captured(arguments, path)
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    for _ in range(count):
        arguments[0].normal_(generator=generator)
        arguments[1].add_(0.125).remainder_(3.0)
        graph.replay()
        seen = [each.clone() for each in results]
        for expected, found in zip(chain(*arguments, path), seen, strict=True):
            wrong += (expected != found).any()
    bad = int(wrong)
    del graph, results
    return bad


def growth_under_a_graph() -> tuple[bool, int, int]:
    """A graph that holds a workspace stays right when a wider model makes a larger one beside it."""
    anew()
    arguments = given(8, 4096)
    graph, results = captured(arguments)
    graph.replay()
    before = [each.clone() for each in results]
    small = next(iter(WORKSPACES.status())).memory
    for _ in range(3):
        assert run(ADD, 1000, 8192) <= 1
    for each in results:
        each.zero_()
    graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(before, results, strict=True))
    return same, small, next(iter(WORKSPACES.status())).memory


def memory_returns() -> tuple[int, int, int]:
    """MiB that a workspace of a group takes, that are back when the group is gone, and that the status said."""
    anew()
    run("all_reduce", 4, 4096)  # the default group's own, and CUDA's context
    group = dist.new_group(list(range(dist.get_world_size())))
    assert group is not None
    dist.all_reduce(torch.ones(1, device="cuda"), group=group)
    torch.cuda.synchronize()
    start = torch.cuda.mem_get_info()[0]
    run("all_reduce", 1000, 8192, group=group.group_name)
    said = max(each.memory for each in WORKSPACES.status())
    torch.cuda.empty_cache()
    taken = start - torch.cuda.mem_get_info()[0]
    before = torch.cuda.mem_get_info()[0]
    fusion_flashinfer.release(group.group_name)
    returned = torch.cuda.mem_get_info()[0] - before
    dist.barrier()
    return taken // MIB, returned // MIB, said // MIB


def groups_in_turn() -> float:
    """Calls on two groups of overlapping ranks, one after another."""
    anew()
    half = dist.get_world_size() // 2 or 1
    rank = dist.get_rank()
    sets = [list(range(dist.get_world_size()))] if half == 1 else [list(range(half)), list(range(half, 2 * half))]
    mine = [dist.new_group(ranks) for ranks in sets][0 if half == 1 else rank // half]
    assert mine is not None
    worst = 0.0
    for tokens in (1, 5, 300):
        worst = max(worst, run(ADD, tokens, 4096), run(ADD, tokens, 2880, group=mine.group_name))
    return worst


def streams_in_turn() -> int:
    """Calls on two streams without a word between them: results that differ from those of one stream."""
    anew()
    arguments = given(16, 4096)
    expected = chain(*arguments)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = 0
    for index in range(50):
        with torch.cuda.stream(streams[index % 2]):
            found = chain(*arguments)
        torch.cuda.synchronize() if index % 10 == 9 else None
        if index % 10 == 9:
            wrong += sum(not torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    return wrong


def poisoned() -> list[str]:
    """Every kernel with the driver's multicast calls replaced by ones that raise; which were reached."""
    from cuda.bindings import driver

    reached: list[str] = []

    def poison(name: str) -> Any:
        def raiser(*args: Any) -> Any:
            reached.append(name)
            raise AssertionError(f"{name} was called")

        return raiser

    names = ("cuMulticastCreate", "cuMulticastAddDevice", "cuMulticastBindMem", "cuMulticastBindAddr")
    kept = {name: getattr(driver, name) for name in names}
    for name in names:
        setattr(driver, name, poison(name))
    try:
        for path in ("one-shot", "two-shot"):
            calls, off = grid(path, [1, 300], [4096])
            assert calls
            reached += off
        return reached
    finally:
        for name, function in kept.items():
            setattr(driver, name, function)


class Layers(nn.Module):
    """Layers that end in a row-parallel linear, an all_reduce, a residual and an RMSNorm."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        ranks = dist.get_world_size()
        self.up = nn.ModuleList(nn.Linear(size, size // ranks, bias=False) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(size // ranks, size, bias=False) for _ in range(count))
        self.weight = nn.ParameterList(torch.ones(size) for _ in range(count))

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        for up, down, weight in zip(self.up, self.down, self.weight, strict=True):
            residual = residual + all_reduce(down(up(hidden)), "sum", dist.group.WORLD)
            hidden = nn.functional.rms_norm(residual, weight.shape, weight, 1e-5)
        return hidden


def reduce_overhead(steps: int) -> tuple[list[str | None], float, float, float]:
    """A model under Inductor's own CUDA graphs: strategies, and the errors of fused and unfused, and the magnitude."""
    anew()
    torch._dynamo.reset()
    torch.manual_seed(dist.get_rank())
    with torch.device("cuda"):
        model = Layers(4, 4096)
    exact_model = model.double()
    exact_weights = {name: each.clone() for name, each in exact_model.state_dict().items()}
    half = Layers(4, 4096).cuda()
    half.load_state_dict(exact_weights)
    half = half.bfloat16()
    exact_model.load_state_dict({name: each.double() for name, each in half.state_dict().items()})
    common = torch.Generator("cuda").manual_seed(1)
    fused = fusion_core.compile(half, ALONE, mode="reduce-overhead", dynamic=False)
    plain = torch.compile(half, mode="reduce-overhead", dynamic=False)
    # eager is the definition: Inductor leaves roundings out that the model asks for, and a fused kernel does not
    errors, magnitude = {"fused": 0.0, "plain": 0.0, "eager": 0.0}, 0.0
    with torch.no_grad():
        for _ in range(steps):
            pair = [torch.randn(8, 4096, device="cuda", generator=common).bfloat16() for _ in range(2)]
            exact = exact_model(*(each.double() for each in pair))
            magnitude = max(magnitude, float(exact.abs().max()))
            for name, function in (("fused", fused), ("plain", plain), ("eager", half)):
                torch.compiler.cudagraph_mark_step_begin()
                errors[name] = max(errors[name], float((function(*pair).double() - exact).abs().max()))
    fused_report = next(r for r in reversed(fusion_core.reports()) if r.sites)
    assert not any(site.run_time for site in fused_report.sites)
    torch._dynamo.reset()
    gc.collect()
    return (
        [site.strategy for site in fused_report.sites],
        errors["fused"],
        max(errors["plain"], errors["eager"]),
        magnitude,
    )


def dynamic_crossing() -> tuple[list[tuple[tuple[int, str | None], ...]], list[float], int]:
    """One graph for all token counts, one-shot up to 64 and two-shot up to 256: choices, errors, graphs compiled."""
    anew()
    torch._dynamo.reset()
    torch.manual_seed(dist.get_rank())
    model, row = Layers(2, 4096).cuda().bfloat16(), 4096 * 2
    before, errors = len(fusion_core.reports()), []
    with torch.no_grad(), faster(64 * row, 256 * row, Device.here().arch, dist.get_world_size()):
        compiled = fusion_core.compile(model, ALONE, dynamic=True)
        for tokens in (2, 63, 64, 65, 255, 256, 257, 1000):
            common = torch.Generator("cuda").manual_seed(tokens)
            pair = [torch.randn(tokens, 4096, device="cuda", generator=common).bfloat16() for _ in range(2)]
            expected = model(*pair).float()
            errors.append(float((compiled(*pair).float() - expected).abs().max() / expected.abs().max()))
    reports = fusion_core.reports()[before:]
    assert failures() == []
    sites = [site for report in reports for site in report.sites]
    return [tuple((each.first, each.strategy) for each in site.choices) for site in sites], errors, len(reports)


def first_call_in_a_capture() -> tuple[float, list[str]]:
    """A graph whose capture is the first that the operator hears of the group: unfused, with the reason."""
    anew()
    x, _, weight = given(4, 4096)
    dist.all_reduce(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        _, reduced = torch.ops.fusion_flashinfer.all_reduce_rms_norm(x, weight, 1e-5, 0.0, world())
    graph.replay()
    exact = x.clone()
    dist.all_reduce(exact)
    error = float((reduced.float() - exact.float()).abs().max())
    del graph
    return error, [str(reason) for reason in fallen_back("flashinfer.all_reduce_rms_norm", world())]


def llama_generates(steps: int) -> dict[str, Any]:
    """`llama.generate` by FlashInfer's strategies alone."""
    anew()
    with mock.patch.dict(os.environ, {"FUSION_CORE_ORDER": "flashinfer", "FUSION_CORE_TABLE": "none"}):
        return llama.generate(steps)
