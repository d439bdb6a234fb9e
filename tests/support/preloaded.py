# ruff: noqa: F401
"""What workers import before they compile: `tests.support.forked` has it imported once. No thread may start here."""

import torch
import torch._inductor.async_compile
import torch._inductor.codecache
import torch._inductor.compile_fx
import torch._inductor.fx_passes.joint_graph
import torch._inductor.fx_passes.post_grad
import torch._inductor.graph
import torch.distributed._functional_collectives

import fusion_core.workers.process
import tests.support.graphs
import tests.support.one_loop
