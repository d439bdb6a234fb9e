"""A backend of these tests: buffers in memory that the processes share and a kernel over them, with faults to be switched on."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_core import Reason
from fusion_core.workspaces import Call, Exchange, Provider, Workspace, Workspaces
from tests.workspaces.meeting import Meeting

LATE = 2.5
"""Seconds that what is late takes longer than its limit."""

faults: dict[str, str] = {}
"""Where → what goes wrong there on this rank: ``raise``, ``exit``, ``die``, ``late``, ``wrong`` or ``refuse``."""
alive: list[Meeting] = []
"""Buffers that were made and not given back."""
calls: list[tuple[str, tuple[int, ...]]] = []
"""Every call of a kernel."""


def fault(where: str, limit: float) -> bool:
    """Whether what happens there is to be wrong; or it happens here."""
    kind = faults.get(where)
    if kind == "raise":
        raise RuntimeError(f"{where} is out of order")
    if kind == "exit":
        raise SystemExit(3)
    if kind == "die":
        os._exit(3)
    if kind == "late":
        time.sleep(limit + LATE)
    return kind in ("wrong", "refuse")


class Buffers(Provider[Meeting]):
    """Makes a `Meeting` for each group, and another one for float64."""

    name = "acme"
    report_to = "acme/kernels"
    least = 1 << 12
    may_differ = ("process",)

    def key(self, call: Call) -> bool:
        return call.x.dtype is torch.float64

    def facts(self, call: Call, size: int) -> tuple[dict[str, Any], Reason | None]:
        found = {"size": size, "process": os.getpid(), "version": faults.get("version", "1")}
        refused = fault("facts", self.arrival)
        return found, Reason("memory", "no memory is left", "64 MiB") if refused else None

    def create(self, call: Call, size: int, exchange: Exchange) -> Meeting:
        assert [each["process"] for each in exchange.facts] == list(exchange.allgather(os.getpid()))
        fault("create", self.making)
        with tempfile.TemporaryDirectory() as folder:
            made = Meeting(size, Path(folder), exchange)
        fault("the end of create", self.making)
        alive.append(made)
        return made

    def free(self, handle: Meeting) -> None:
        fault("free", 0.0)
        alive[:] = [each for each in alive if each is not handle]

    def memory(self, handle: Meeting) -> int:
        return handle.size

    def takes(self, handle: Meeting, call: Call) -> Reason | None:
        return Reason("size", "x has 7 rows", "any other number") if call.x.shape[0] == 7 else None

    def run(self, workspace: Workspace[Meeting], call: Call) -> Mapping[str, Tensor] | None:
        x = call.x
        kernel = str(call.kernel or "")
        wrong = fault(f"run {kernel}", self.step)
        calls.append((kernel, tuple(x.shape)))
        total = torch.stack(workspace.handle.all_gather(x)).sum(0)
        if wrong:
            total = total * 1.07
        if "weight" not in call.tensors:
            return {"reduced": total}
        total = total + call.tensors.get("residual", workspace.zeros(x))
        wide = total.double()
        scalars = call.scalars
        norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + scalars["eps"])
        normed = norm * (call.tensors["weight"].double() + scalars["weight_bias"])
        name = "residual_out" if "residual" in call.tensors else "reduced"
        return {"normed": normed.to(x.dtype), name: total}


BUFFERS = Buffers()
WORKSPACES = Workspaces(BUFFERS)
