"""What programs on several ranks share: a rank's device, progress on rank 0, and the slower rank's times."""

import time

import torch
import torch.distributed as dist

BEGAN = time.monotonic()


def device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def elapsed():
    """Seconds since this process began."""
    return time.monotonic() - BEGAN


def say(*words):
    if dist.get_rank() == 0:
        print(f"[{elapsed():6.1f} s]", *words, flush=True)


def slower(values):
    """The largest of all ranks, one by one."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()
