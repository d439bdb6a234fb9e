# ruff: noqa: F401
"""Imports that workers need to compile: `tests.support.forked` makes them once. No thread may start here."""

import sympy.physics.units
import torch
import torch._inductor.async_compile
import torch._inductor.choices
import torch._inductor.codecache
import torch._inductor.codegen.cpp_wrapper_gpu
import torch._inductor.codegen.cpu_device_op_overrides
import torch._inductor.compile_fx
import torch._inductor.fx_passes.joint_graph
import torch._inductor.fx_passes.post_grad
import torch._inductor.graph
import torch._inductor.hooks
import torch._inductor.kernel_template_choice
import torch.distributed._functional_collectives
import torch.utils.cpp_extension
import tqdm
from torch._inductor import config
from torch._inductor.codecache import torch_key
from torch._inductor.codegen.common import init_backend_registration

import fusion_core.workers.process
import tests.support.graphs
import tests.support.one_loop
from fusion_core._torch import inductor


def compile_once() -> None:
    """Compile once here: a process's first compilation spends seconds on tables that are the same in every process."""
    backend = inductor.post_grad_only(lambda graph: None)
    interval, tqdm.tqdm.monitor_interval = tqdm.tqdm.monitor_interval, 0  # torch.export draws a bar, with a thread
    with torch.no_grad(), config.patch(compile_threads=1):
        torch.compile(lambda x: torch.nn.functional.rms_norm(x, (8,)), backend=backend)(torch.ones(2, 8))
    tqdm.tqdm.monitor_interval = interval
    init_backend_registration()
    torch_key()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


compile_once()
tests.support.one_loop.use()
