"""vLLM's all_reduce outside of an engine, so that ``fusion-core tune --collective vllm`` can measure it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core import AllReduce, ConfigError


def all_reduce() -> AbstractContextManager[AllReduce]:
    """``vllm::all_reduce`` over all ranks, with the kernels that vLLM chooses on this machine. All ranks enter it.

    Raises:
        ConfigError: this release of vLLM is not known.
    """
    import vllm
    import vllm.distributed.parallel_state

    from fusion_vllm import versions

    if not versions.is_known(vllm.__version__):
        raise ConfigError(f"vLLM is {vllm.__version__}, needs {' or '.join(versions.KNOWN)}")
    return _set_up()


@contextmanager
def _set_up() -> Iterator[AllReduce]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    cuda = torch.cuda.is_available()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            dist.get_world_size(),
            dist.get_rank(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            backend=dist.get_backend(),
        )
        parallel_state.initialize_model_parallel(dist.get_world_size())
        name = parallel_state.get_tp_group().unique_name

        def run(x: Tensor) -> Tensor:
            reduced: Tensor = torch.ops.vllm.all_reduce(x, group_name=name)
            return reduced

        def capture() -> AbstractContextManager[object]:
            if not cuda:
                return nullcontext()
            # its kernels register a graph's buffers when the capture ends; else each call copies its input
            found: AbstractContextManager[object] = parallel_state.graph_capture(torch.device("cuda"))
            return found

        try:
            yield AllReduce("vllm::all_reduce", run, capture)
        finally:
            parallel_state.destroy_model_parallel()
