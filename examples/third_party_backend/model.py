"""torchrun --nproc-per-node 2 model.py [HIDDEN_SIZE]"""

import sys

import torch
import torch.distributed as dist
from fusion_acme.ops import dynamic_tanh
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce

import fusion_core


class Block(nn.Module):
    """Two halves of a tensor-parallel layer: one ends in an RMSNorm in plain torch, one in Acme's operator."""

    def __init__(self, size: int, ranks: int) -> None:
        super().__init__()
        self.up, self.gate = (nn.Linear(size, size // ranks, bias=False) for _ in range(2))
        self.down, self.back = (nn.Linear(size // ranks, size, bias=False) for _ in range(2))
        self.rms, self.gamma, self.beta = (nn.Parameter(torch.linspace(0.5, 1.5, size)) for _ in range(3))

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + all_reduce(self.down(self.up(hidden)), "sum", dist.group.WORLD)
        hidden = nn.functional.rms_norm(residual, self.rms.shape, self.rms, 1e-6)
        residual = residual + all_reduce(self.back(self.gate(hidden).relu()), "sum", dist.group.WORLD)
        return dynamic_tanh(residual, self.gamma, self.beta, 0.8), residual


def run(size: int = 64) -> float:
    """The largest difference between the compiled and the eager model."""
    torch.manual_seed(dist.get_rank())
    block = Block(size, dist.get_world_size())
    tensors = torch.ones(4, size), torch.linspace(-1, 1, 4 * size).view(4, size)
    with torch.no_grad():
        expected = block(*tensors)
        found = torch.compile(block, backend="fusion_core")(*tensors)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    difference = run(*map(int, sys.argv[1:]))
    if dist.get_rank() == 0:
        print(fusion_core.last_report())
        print(f"\nlargest difference to the model without fusion: {difference:.1e}")
    dist.barrier()  # a gloo thread that is still running the last all_reduce would crash while the interpreter exits
    dist.destroy_process_group()
