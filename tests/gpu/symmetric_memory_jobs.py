"""What the workers of `test_symmetric_memory` run: torch's real kernels over symmetric memory, over NCCL."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce

import fusion_core
import fusion_reference
from fusion_core import FusionPass
from fusion_core.fallback import fallen_back
from fusion_core.testing import subjects
from fusion_reference import symm_mem
from fusion_reference.buffers import BUFFERS
from fusion_reference.ops import OPERATORS
from tests.reference_backend.one_call import given, off, run, world

MIB = 1 << 20


def kernels() -> list[str]:
    """Those that are compiled for this number of ranks."""
    return [each for each in symm_mem.KERNELS if each == "one_shot" or dist.get_world_size() in (2, 4, 8)]


def fresh() -> None:
    """Forget what an earlier test left."""
    BUFFERS.release()


def failures() -> list[str]:
    """What the buffers of this process say that went wrong, or that there are none."""
    states = [f"{each.subject}: {each.state}" for each in BUFFERS.status()]
    return [each for each in states if not each.endswith("in use")] or ([] if states else ["nothing was made"])


def grid(tokens: list[int], hidden: list[int]) -> tuple[int, list[str]]:
    """Every kernel at every size: how many calls, and which are off, or differ between kernels or ranks."""
    fresh()
    calls, found = 0, []
    for dtype in (torch.bfloat16, torch.float32):
        for n in hidden:
            for rows in tokens:
                x = given((rows, n), dtype, dist.get_rank())
                results = {each: OPERATORS[each](x, world()) for each in kernels()}
                calls += len(results)
                where = f"{rows}x{n} {dtype}"
                found += [f"{each} {where}: {far}" for each, y in results.items() if not (far := off(x, y)) <= 1]
                first = results["one_shot"]
                if not all(torch.equal(first, each) for each in results.values()):
                    found.append(f"{where}: the kernels differ")
                theirs = first.clone()
                dist.broadcast(theirs, 0)
                if not torch.equal(first, theirs):
                    found.append(f"{where}: the ranks differ")
    return calls, found + failures()


def chain(x: Tensor) -> list[Tensor]:
    """Sites back to back, each on what the one before gave, and sites of other sizes between them."""
    found = []
    for _ in range(3):
        for each in kernels():
            x = OPERATORS[each](x, world()) * 0.25
            found += [x, OPERATORS[each](x[:1], world())]
    return found


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A function as a CUDA graph, warmed up first as one must."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def replays(count: int, tokens: int, hidden: int) -> tuple[int, list[str]]:
    """Replays of a captured chain, its input changing, whose results are not bit for bit those of eager calls."""
    fresh()
    x = given((tokens, hidden), torch.bfloat16, dist.get_rank())
    graph, results = captured(lambda: chain(x))
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    for _ in range(count):
        x.normal_(generator=generator)
        graph.replay()
        seen = [each.clone() for each in results]
        for expected, found in zip(chain(x), seen, strict=True):
            wrong += (expected != found).any()
    bad = int(wrong)
    del graph, results
    return bad, failures()


def exact_sums(count: int, sizes: list[tuple[int, int]]) -> int:
    """Calls in a row of whole numbers, which every order of summation gives exactly, on ranks out of step: the wrong."""
    fresh()
    for each in kernels():
        for shape in sizes:
            OPERATORS[each](torch.ones(shape, device="cuda", dtype=torch.bfloat16), world())
    wrong = torch.zeros((), device="cuda", dtype=torch.int64)
    generator = torch.Generator("cuda").manual_seed(dist.get_rank())
    for index in range(count):
        x = torch.randint(-8, 9, sizes[index % len(sizes)], device="cuda", generator=generator).bfloat16()
        if index % 7 == dist.get_rank():
            torch.cuda._sleep(200_000)  # cycles, some 0.1 ms
        found = [OPERATORS[each](x, world()) for each in kernels() for _ in range(3)]
        dist.all_reduce(x)
        for each in found:
            wrong += (each != x).any()
    return int(wrong)


def growth_under_a_graph() -> tuple[bool, int, int]:
    """A graph that holds a buffer stays right when a larger one comes beside it."""
    fresh()
    x = given((8, 4096), torch.bfloat16, dist.get_rank())
    graph, results = captured(lambda: chain(x))
    graph.replay()
    before = [each.clone() for each in results]
    small = next(iter(BUFFERS.status())).memory
    for each in kernels():
        assert run(each, 4096, 8192) <= 1
    for each in results:
        each.zero_()
    graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(before, results, strict=True))
    return same, small, next(iter(BUFFERS.status())).memory


def first_call_in_a_capture() -> tuple[float, list[str]]:
    """A graph whose capture is the first that the operator hears of the group: torch's all_reduce, with the reason."""
    fresh()
    group = dist.new_group(list(range(dist.get_world_size())))  # of its own: what fell back is remembered
    assert group is not None
    x = given((4, 4096), torch.bfloat16, dist.get_rank())
    exact = x.clone()
    dist.all_reduce(exact, group=group)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = OPERATORS["one_shot"](x, group.group_name)
    graph.replay()
    error = float((found.float() - exact.float()).abs().max())
    del graph
    return error, [str(reason) for reason in fallen_back("reference.symm_mem_one_shot", group.group_name)]


def memory_returns() -> tuple[int, int, int]:
    """MiB that a buffer of a group takes, that are back when it is released, and that the status said."""
    fresh()
    run("one_shot", 4, 4096)  # the default group's own, and CUDA's context
    group = dist.new_group(list(range(dist.get_world_size())))
    assert group is not None
    dist.all_reduce(torch.ones(1, device="cuda"), group=group)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    start = torch.cuda.mem_get_info()[0]
    run("one_shot", 4000, 8192, group=group.group_name)
    said = max(each.memory for each in BUFFERS.status())
    torch.cuda.empty_cache()
    taken = start - torch.cuda.mem_get_info()[0]
    dist.barrier()
    fusion_reference.release(group.group_name)
    gc.collect()
    dist.barrier()  # the driver has the memory back when the last rank has let go of it
    torch.cuda.synchronize()
    returned = torch.cuda.mem_get_info()[0] - (start - taken)
    return taken // MIB, returned // MIB, said // MIB


def groups_in_turn() -> float:
    """Calls on two groups of all ranks, one after another."""
    fresh()
    other = dist.new_group(list(range(dist.get_world_size())))
    assert other is not None
    return max(
        run(each, tokens, 4096, group=group) for tokens in (1, 5, 300) for each in kernels()
        for group in (None, other.group_name)
    )  # fmt: skip


def streams_in_turn() -> int:
    """Calls on two streams without a word between them: results that differ from those of one stream."""
    fresh()
    x = given((16, 4096), torch.bfloat16, dist.get_rank())
    expected = chain(x)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = 0
    for index in range(50):
        with torch.cuda.stream(streams[index % 2]):
            found = chain(x)
        if index % 10 == 9:
            torch.cuda.synchronize()
            wrong += sum(not torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    return wrong


def another_current_device() -> list[float]:
    """Calls while another GPU is the current one."""
    fresh()
    mine = torch.cuda.current_device()
    x = given((5, 4096), torch.bfloat16, dist.get_rank())
    found = []
    for _ in range(2):
        for each in kernels():
            with torch.cuda.device((mine + 1) % torch.cuda.device_count()):
                y = OPERATORS[each](x, world())
            found.append(off(x, y))
    return found


def multicast() -> list[int]:
    """The multicast addresses of the buffers that are held."""
    fresh()
    run("one_shot")
    handles = [symm_mem._handle_class().rendezvous(state.handle.memory, state.name) for state in BUFFERS._groups]
    return [handle.multicast_ptr for handle in handles]


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


def compiled(name: str, steps: int) -> tuple[list[str | None], float, float]:
    """A model under Inductor's CUDA graphs with one strategy: strategies, its error, and that of eager torch."""
    fresh()
    torch._dynamo.reset()
    torch.manual_seed(dist.get_rank())
    half = Layers(3, 2048).cuda().bfloat16()
    exact_model = Layers(3, 2048).cuda().double()
    exact_model.load_state_dict({key: value.double() for key, value in half.state_dict().items()})
    (subject,) = (each for each in subjects("reference") if each.name == name)
    options: dict[str, Any] = {
        "post_grad_custom_post_pass": FusionPass(registry=subject.alone()),
        "fx_graph_cache": False,
        "triton.cudagraphs": True,
    }
    model = torch.compile(half, options=options, dynamic=False)
    common = torch.Generator("cuda").manual_seed(1)
    errors = [0.0, 0.0]
    with torch.no_grad():
        for _ in range(steps):
            pair = [torch.randn(8, 2048, device="cuda", generator=common).bfloat16() for _ in range(2)]
            exact = exact_model(*(each.double() for each in pair))
            torch.compiler.cudagraph_mark_step_begin()
            for index, function in enumerate((model, half)):
                errors[index] = max(errors[index], float((function(*pair).double() - exact).abs().max()))
    report = next(r for r in reversed(fusion_core.reports()) if r.sites)
    assert not any(site.run_time for site in report.sites), str(report)
    torch._dynamo.reset()
    gc.collect()
    return [site.strategy for site in report.sites], errors[0], errors[1]
