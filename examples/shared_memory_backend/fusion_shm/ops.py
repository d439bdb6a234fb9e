"""The operator: a schema that follows from the pattern, a fake, and the call."""

import torch
from torch import Tensor

from fusion_core.patterns.plain import all_reduce_add_rms_norm as pattern
from fusion_core.workspaces import Call, register_operator
from fusion_shm.workspaces import WORKSPACES

OUTPUTS = ("normed", "residual_out")
LIBRARY = torch.library.Library("fusion_shm", "DEF")


def run(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str, max_tokens: int | None = None
) -> tuple[Tensor, ...]:
    size = x.shape[-1]
    tensors = {"x": x.reshape(-1, size).contiguous(), "residual": residual.reshape(-1, size), "weight": weight}
    call = Call(
        pattern, "shm.all_reduce_add_rms_norm", tensors, group, {"eps": eps}, outputs=OUTPUTS, max_tokens=max_tokens
    )
    results = WORKSPACES.run(call)
    return tuple(results[name].view(x.shape) for name in OUTPUTS)


def fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str, max_tokens: int | None = None):
    return x.new_empty(x.shape), x.new_empty(x.shape)


all_reduce_add_rms_norm = register_operator(
    LIBRARY, pattern, run, fake, scalars=("eps",), outputs=OUTPUTS, options=("int? max_tokens=None",)
)
