"""A CPU platform of vLLM whose models are compiled as on CUDA, and kernels for it."""

import os


def platform() -> str | None:
    """vLLM asks each process; VLLM_LAB switches it on, so that stock vLLM is tested in the same environment."""
    return "vllm_lab.platform.CpuByCudasPath" if os.environ.get("VLLM_LAB") else None
