"""What workers of `test_stack` run."""

import torch
import torch.distributed as dist

from fusion_core.bench.shapes import SHAPES
from fusion_core.bench.stack import Stack, tokens

LAYERS, BATCH, CONTEXT = 2, 3, 16
CPU = torch.device("cpu")


def stack(name="tiny", dtype=torch.float32):
    made = Stack(SHAPES[name], LAYERS, BATCH, CONTEXT, dist.group.WORLD, CPU)
    return made.to(dtype)


def sharded():
    """This rank's weights and cache, as they are before the step, and what the step gives."""
    made = stack()
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with torch.no_grad():
        return state, made(tokens(SHAPES["tiny"], BATCH, CPU).float())
