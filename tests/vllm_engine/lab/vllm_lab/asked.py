"""What the tests ask of a worker."""

from typing import Any


def calls(worker: Any) -> dict[str, int]:
    """How often each kernel of the lab ran in this worker, and vLLM's own all_reduce."""
    from vllm_lab import communicator, kernels

    return {**kernels.CALLS, **communicator.CALLS}
