"""torchrun --nproc-per-node 2 -m fusion_core bench examples/bench_step.py:step"""

import functools

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

HIDDEN, INTERMEDIATE, LAYERS = 256, 1024, 2


class Layer(torch.nn.Module):
    """A tensor-parallel MLP between two norms: this rank's columns of one matrix, its rows of the next."""

    def __init__(self) -> None:
        super().__init__()
        share = INTERMEDIATE // dist.get_world_size()
        self.norm = torch.nn.RMSNorm(HIDDEN, eps=1e-6)
        self.up = torch.nn.Linear(HIDDEN, share, bias=False)
        self.down = torch.nn.Linear(share, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.down(F.silu(self.up(self.norm(x))))
        return x + funcol.all_reduce(share, "sum", dist.group.WORLD)


@functools.cache  # one model for all batch sizes
def model() -> torch.nn.Module:
    torch.manual_seed(dist.get_rank())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = torch.nn.Sequential(*(Layer() for _ in range(LAYERS)), torch.nn.RMSNorm(HIDDEN, eps=1e-6))
    return layers.to(device, torch.bfloat16)


def step(batch: int):
    torch.manual_seed(0)  # the same on every rank
    weight = next(model().parameters())
    return model(), (torch.randn(batch, HIDDEN).to(weight),)
