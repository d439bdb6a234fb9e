"""vLLM's CPU platform, but for what keeps it off CUDA's compile path."""

from typing import Any

from vllm.platforms.cpu import CpuPlatform


class CpuByCudasPath(CpuPlatform):
    """VLLM_COMPILE with piecewise graphs, ``vllm::all_reduce`` and vLLM IR, as on CUDA."""

    @classmethod
    def use_custom_op_collectives(cls) -> bool:
        return True

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm_lab.communicator.OutOfPlace"

    @classmethod
    def get_pass_manager_cls(cls) -> str:
        return "vllm_lab.pass_manager.WithoutDefunctionalization"

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        from vllm.config import CompilationMode  # which needs the platform

        compilation = vllm_config.compilation_config
        asked = compilation.mode, compilation.ir_enable_torch_wrap
        super().check_and_update_config(vllm_config)  # sets another mode
        if asked[0] == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.ir_enable_torch_wrap = asked
