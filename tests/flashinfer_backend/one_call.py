"""One call of an operator, compared with float64; on the GPU where the process group is NCCL's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fusion_core import Pattern
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary import all_reduce
from fusion_core.workspaces.self_check import distance, exactly
from fusion_flashinfer.kernels import KERNELS

BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def device() -> torch.device:
    """This rank's."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def inputs(kernel: Any, tokens: int, hidden: int, dtype: torch.dtype, bias: float, rank: int) -> dict[str, Any]:
    """Arguments of a pattern, its x different on every rank."""
    where = device()
    own, common = torch.Generator(where).manual_seed(rank + 7 * tokens), torch.Generator(where).manual_seed(tokens)
    found: dict[str, Any] = {"x": torch.randn(tokens, hidden, generator=own, device=where).to(dtype)}
    if not kernel.norms:
        return found
    if kernel.adds:
        found["residual"] = torch.randn(tokens, hidden, generator=common, device=where).to(dtype)
    found["weight"] = (torch.rand(hidden, generator=common, device=where) + 0.5 - bias).to(dtype)
    if kernel.quantization == "static_fp8":
        found["scale"] = torch.full((1,), 1 / 32, device=where)  # so that no code of many millions saturates
    found |= {"eps": 1e-5, "weight_bias": bias}
    if kernel.quantization == "group_fp8":
        found["group_size"] = 128
    return found


def run(name: str, tokens: int = 4, hidden: int = 256, dtype: torch.dtype = torch.bfloat16, *, bias: float = 0.0,
        group: str | None = None, lead: tuple[int, ...] = (), **where: Any) -> float:  # fmt: skip
    """One call of an operator: its distance from float64, in units of what its dtypes allow.

    ``where`` is what operators take behind the group: ``max_tokens``, ``pdl``, ``two_shot``, ``always``.
    """
    kernel = BY_NAME[name]
    group = group or dist.group.WORLD.group_name
    rank = dist.distributed_c10d._resolve_process_group(group).rank()
    given = inputs(kernel, tokens, hidden, dtype, bias, rank)
    shaped = [
        v.view(*lead, hidden) if lead and isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in given.values()
    ]
    before = [each.clone() for each in shaped if isinstance(each, torch.Tensor)]
    operator = getattr(torch.ops.fusion_flashinfer, name)
    returned = operator(*shaped, group, **where)
    after = [each for each in shaped if isinstance(each, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written"
    returned = returned if isinstance(returned, tuple) else (returned,)
    results = dict(zip(kernel.outputs, returned, strict=True))
    if lead:
        assert all(r.shape[:-1] == lead for n, r in results.items() if not (n == "scale" and "group" in name))
        results = {n: r if r.dim() == 2 else r.reshape(tokens, -1) for n, r in results.items()}
    pattern = next(each for each in CORE_PATTERNS if each.name == kernel.pattern)
    tensors = {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
    scalars = {n: v for n, v in given.items() if n not in tensors}
    return off(pattern, results, tensors, scalars, group)


def off(pattern: Pattern, results: Any, tensors: Any, scalars: Any, group: str) -> float:
    """How far results are from float64, in units of what their dtypes allow."""
    if pattern.name.endswith("group_fp8"):
        scalars = {**scalars, "scale_format": "ue8m0_packed"}
    exact = exactly(pattern, all_reduce(tensors["x"].double(), group), tensors, scalars)
    return distance(pattern, results, exact, {**tensors, **scalars})
