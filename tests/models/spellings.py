"""One chain, ``all_reduce -> + residual -> RMSNorm``, with its all_reduce written in the ways that torch offers."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fusion_core import FusionConfig, FusionPass
from fusion_core._torch.inductor import post_grad_only
from tests.support.collectives import reaching_the_group

HIDDEN = 16
EPS = 1e-5
SPELLINGS: dict[str, Callable[..., Any]] = {}

c10d = torch.ops._c10d_functional
Tensor = torch.Tensor

MADE: dict[str, Any] = {}
"""What is made once in a process, outside of any graph: another group, a mesh, a parallel module."""


def spelling(function: Callable[..., Any]) -> Callable[..., Any]:
    SPELLINGS[function.__name__] = function
    return function


def add_norm(reduced: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = reduced + residual
    return nn.functional.rms_norm(total, (HIDDEN,), weight, EPS), total


def world() -> str:
    return dist.group.WORLD.group_name


# ---- functional collectives


@spelling
def functional(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return add_norm(funcol.all_reduce(x @ x.mT @ x, "sum", dist.group.WORLD), residual, weight)


@spelling
def functional_over_a_mesh(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return add_norm(funcol.all_reduce(2 * x, "sum", MADE["mesh"]), residual, weight)


@spelling
def waited_for_at_once(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return add_norm(funcol.wait_tensor(funcol.all_reduce(2 * x, "sum", dist.group.WORLD)), residual, weight)


@spelling
def waited_for_at_a_distance(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    pending = c10d.all_reduce(2 * x, "sum", world())
    meanwhile = residual.mT @ residual
    return *add_norm(c10d.wait_tensor(pending), residual, weight), meanwhile


@spelling
def waited_for_twice(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    reduced = c10d.wait_tensor(c10d.all_reduce(2 * x, "sum", world()))
    return add_norm(c10d.wait_tensor(reduced), residual, weight)


@spelling
def mean_over_ranks(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return add_norm(funcol.all_reduce(2 * x, "avg", dist.group.WORLD), residual, weight)


@spelling
def coalesced_alone(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    (reduced,) = funcol.all_reduce_coalesced([2 * x], "sum", dist.group.WORLD)
    return add_norm(reduced, residual, weight)


@spelling
def coalesced_with_another(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    reduced, other = funcol.all_reduce_coalesced([2 * x, 3 * x], "sum", dist.group.WORLD)
    return *add_norm(reduced, residual, weight), other + 0


@spelling
def scattered_and_gathered(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    ranks = dist.get_world_size()
    part = c10d.wait_tensor(c10d.reduce_scatter_tensor(2 * x, "sum", ranks, world()))
    return add_norm(c10d.wait_tensor(c10d.all_gather_into_tensor(part, ranks, world())), residual, weight)


@spelling
def two_groups(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    normed, total = add_norm(funcol.all_reduce(2 * x, "sum", dist.group.WORLD), residual, weight)
    return add_norm(funcol.all_reduce(3 * normed, "sum", MADE["group"]), total, weight)


# ---- torch.distributed.all_reduce, which writes into its argument


@spelling
def in_place(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    partial = 2 * x
    dist.all_reduce(partial)
    return add_norm(partial, residual, weight)


@spelling
def in_place_with_arguments(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    partial = 2 * x
    dist.all_reduce(partial, op=dist.ReduceOp.SUM, group=dist.group.WORLD)
    return add_norm(partial, residual, weight)


@spelling
def in_place_on_a_view(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    partial = (x.reshape(-1, HIDDEN) @ weight.diag()).view(x.shape)
    dist.all_reduce(partial)
    return add_norm(partial, residual, weight)


@spelling
def in_place_on_an_input(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    dist.all_reduce(x)
    return add_norm(x, residual, weight)


@spelling
def in_place_in_two_groups(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    partial = 2 * x
    dist.all_reduce(partial)
    normed, total = add_norm(partial, residual, weight)
    partial = 3 * normed
    dist.all_reduce(partial, group=MADE["group"])
    return add_norm(partial, total, weight)


@spelling
def in_place_under_a_coalescing_manager(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    reduced, other = 2 * x, 3 * x
    with dist._coalescing_manager():
        dist.all_reduce(reduced)
        dist.all_reduce(other)
    return *add_norm(reduced, residual, weight), other


@spelling
def asynchronous(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    partial = 2 * x
    work = dist.all_reduce(partial, async_op=True)
    meanwhile = residual.mT @ residual
    work.wait()
    return *add_norm(partial, residual, weight), meanwhile


@spelling
def operator_that_writes(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    partial = 2 * x
    return add_norm(c10d.wait_tensor(c10d.all_reduce_(partial, "sum", world())), residual, weight)


# ---- DTensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN, EPS)

    def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + self.down(nn.functional.silu(self.up(residual)))
        return self.norm(total) * weight, total


@spelling
def dtensor_parallel_styles(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
    return MADE["block"](x, residual, weight)


# ---- what the workers do


@dataclass
class Ran:
    """One spelling on one rank."""

    eager: list[Tensor] = field(default_factory=list)  # results, and the inputs behind the call
    fused: list[Tensor] = field(default_factory=list)
    unfused_calls: Counter[str] = field(default_factory=Counter)  # what reached the process group from compiled code
    fused_calls: Counter[str] = field(default_factory=Counter)
    sites: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[list[dict[str, Any]]] = field(default_factory=list)  # of each site: near misses, and each strategy's
    groups: tuple[str, str] = ("", "")
    graphs: int = 0
    error: str = ""  # of torch, where it does not compile the spelling as one graph


def run(name: str, fullgraph: bool) -> Ran:
    """A spelling as it stands, and compiled without and with fusion."""
    if not MADE:
        _make()
    ran, function = Ran(groups=(world(), MADE["group"].group_name)), SPELLINGS[name]
    own = FusionPass(FusionConfig(order=("reference",)))

    def fuse(graph: fx.Graph) -> None:
        ran.graphs += 1
        report = own.run(graph)
        ran.sites += report.to_dict()["sites"]
        for site in report.sites:
            reasons = [miss.reason for miss in site.near_misses]
            reasons += [reason for decision in site.decisions for reason in decision.reasons]
            ran.reasons.append([reason.to_dict() for reason in reasons])

    with torch.no_grad():
        ran.eager, _ = _called(function)
        try:
            _, ran.unfused_calls = _called(_compiled(function, lambda graph: None, fullgraph))
            ran.fused, ran.fused_calls = _called(_compiled(function, fuse, fullgraph))
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.BackendCompilerFailed) as error:
            ran.error = str(error)
    return ran


def _make() -> None:
    MADE["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    MADE["group"] = dist.new_group(list(range(dist.get_world_size())))
    torch.manual_seed(0)
    MADE["block"] = parallelize_module(Block(), MADE["mesh"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _compiled(function: Callable[..., Any], own: Callable[[fx.Graph], None], fullgraph: bool) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=post_grad_only(own), fullgraph=fullgraph)


def _called(function: Callable[..., Any]) -> tuple[list[Tensor], Counter[str]]:
    """Results and, behind them, the inputs as the call left them; the same inputs on every call."""
    draw = torch.Generator().manual_seed(0)
    residual, weight = torch.randn(4, 6, HIDDEN, generator=draw), 0.5 + torch.rand(HIDDEN, generator=draw)
    x = torch.randn(4, 6, HIDDEN, generator=draw.manual_seed(1 + dist.get_rank()))
    results: list[Tensor] = []
    calls = reaching_the_group(lambda: results.extend(function(x, residual, weight)))
    return [each.clone() for each in (*results, x, residual, weight)], calls
