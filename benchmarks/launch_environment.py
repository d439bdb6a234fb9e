"""What has to be set before torch and NCCL start, for the benchmarks on several GPUs: imported before torch."""

import os
import sys
import tempfile
from pathlib import Path

_MULTICAST_OFF = {
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "FLASHINFER_CONFIDENTIAL_COMPUTE": "0",  # where it is 1, FlashInfer takes its memory from torch, with multicast
}
for _name, _wanted in _MULTICAST_OFF.items():
    if os.environ.setdefault(_name, _wanted) != _wanted:
        print(f"{_name} is {os.environ[_name]!r}, needs {_wanted!r}: NVLink multicast has to stay off", file=sys.stderr)
        sys.exit(2)

_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "fusion_core_benchmarks")))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(16, len(os.sched_getaffinity(0)) // _RANKS))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# NCCL is some 5 µs a call faster in a CUDA graph that no NCCL call outside of the graph may overlap with
os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler says on stderr when it starts


def settings():
    """What of fusion_core's and of NCCL's graphs the environment sets, as it stands before a command."""
    ours = ("FUSION_CORE_", "NCCL_GRAPH_MIXING_SUPPORT")
    return "".join(f"{name}={value} " for name, value in sorted(os.environ.items()) if name.startswith(ours))
