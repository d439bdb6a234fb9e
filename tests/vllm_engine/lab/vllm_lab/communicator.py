"""The platform's collectives. Apart from it, since vLLM's modules need the platform when they are imported."""

import torch
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

CALLS = {"all_reduce": 0}
"""How often this process called vLLM's all_reduce."""


class OutOfPlace(CpuCommunicator):
    """``vllm::all_reduce`` promises a new tensor; that of the CPU writes into its argument."""

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        CALLS["all_reduce"] += 1
        return super().all_reduce(input_.clone())
