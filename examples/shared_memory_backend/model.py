"""torchrun --nproc-per-node 2 model.py [RANK], where RANK is a rank that finds no folder for its memory"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce

import fusion_core


class Block(nn.Module):
    """The half of a tensor-parallel layer that ends in a norm."""

    def __init__(self, size: int, ranks: int) -> None:
        super().__init__()
        self.down = nn.Linear(size // ranks, size, bias=False)
        self.norm = nn.RMSNorm(size, eps=1e-6)

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + all_reduce(self.down(hidden), "sum", dist.group.WORLD)
        return self.norm(residual), residual


def run(size: int = 64) -> float:
    """The largest difference between the compiled and the eager model."""
    ranks = dist.get_world_size()
    torch.manual_seed(dist.get_rank())
    block = Block(size, ranks)
    tensors = torch.randn(4, size // ranks), torch.linspace(-1, 1, 4 * size).view(4, size)
    with torch.no_grad():
        expected = block(*tensors)
        found = torch.compile(block, backend="fusion_core")(*tensors)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


if __name__ == "__main__":
    if sys.argv[1:] == [os.environ["RANK"]]:
        os.environ["FUSION_SHM_DIRECTORY"] = "/nowhere"
    dist.init_process_group("gloo")
    difference = run()
    if dist.get_rank() == 0:
        print(fusion_core.last_report())
        print(f"\nlargest difference to the model without fusion: {difference:.0e}")
    dist.barrier()  # a gloo thread that is still running the last all_reduce would crash while the interpreter exits
    dist.destroy_process_group()
