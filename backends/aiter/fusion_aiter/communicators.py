"""AITER's communicators, one for each process group, and calls of kernels on them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusion_aiter import creation, library
from fusion_aiter.calls import call as call_kernel
from fusion_aiter.kernels import Form, Staged
from fusion_aiter.stages import MOST, MOST_SHARED
from fusion_core import Device, Reason
from fusion_core.workspaces import Call, Exchange, Provider, Workspace, Workspaces, too_little_memory

SETTINGS = ("AITER_CUSTOM_AR_MAX_SIZE", "AITER_CUSTOM_AR_MIN_SIZE")
"""Environment variables that limit the sizes that AITER takes."""

MARGIN = 64 << 20
"""Bytes that must stay free: HIP rounds up allocations that are shared between GPUs."""


class Aiter(Provider[creation.Made]):
    """AITER's communicators."""

    name = "aiter"
    report_to = "ROCm/aiter"
    arrival = 900.0  # a rank may still build AITER's kernels
    step = creation.STEP
    making = 4 * creation.STEP  # handles of three buffers are exchanged
    least = 1 << 20
    one_at_a_time = True  # AITER counts communicators per process
    may_differ = ("made", "token")

    def label(self, key: object) -> str:
        """The description of a communicator."""
        return "communicator"

    def room(self, call: Call) -> int:
        """The largest input that is ever fused, so that the first workspace fits all."""
        if call.max_tokens is None:
            return MOST
        return min(MOST, 1 << (max(self.least, call.max_tokens * call.row_bytes) - 1).bit_length())

    def check_shape(self, call: Call) -> tuple[int, int]:
        """The smallest input of a large kernel; else few rows, at most those that the smallest communicator takes."""
        row = call.row_bytes
        rows = MOST_SHARED // row + 1 if staged(call).large else min(2 * call.world_size + 1, self.least // row)
        return rows, call.x.shape[-1]

    def facts(self, call: Call, size: int) -> tuple[dict[str, Any], Reason | None]:
        """The facts that ranks compare and exchange, and why this rank cannot make a communicator.

        Imports AITER, and builds its kernels if they are not built yet.
        """
        found: dict[str, Any] = {"max_size": size, "token": uuid.uuid4().hex}
        found |= {name: os.environ.get(name, "") for name in SETTINGS}
        if (store := creation.default_store()) != "TCPStore":
            return found, Reason(
                "store",
                f"the default process group meets over a {store}",
                "a TCPStore, through which AITER exchanges its handles",
                hint="start with torchrun, or init_process_group(init_method='tcp://...')",
            )
        device = call.x.device
        try:
            found |= {"arch": Device.of(device).arch, "release": creation.release()}
            library.module()
            found["made"] = library.communicators_made() or 0
        except Exception as error:  # noqa: BLE001  # an import or a build can fail in any way
            return found, Reason(
                "import",
                f"importing aiter raised {type(error).__name__}: {error}",
                "an AITER that imports here",
                hint="python -c 'import aiter' shows it whole",
            )
        return found, too_little_memory(device, creation.memory(size), MARGIN)

    def create(self, call: Call, size: int, exchange: Exchange) -> creation.Made:
        """Make a communicator together with the other ranks."""
        return creation.create(exchange.group, call.x.device, size, exchange.facts)

    def free(self, handle: creation.Made) -> None:
        """Close a communicator together with the other ranks."""
        creation.free(handle)

    def memory(self, handle: creation.Made) -> int:
        """Bytes of GPU memory."""
        return handle.memory

    def takes(self, handle: creation.Made, call: Call) -> Reason | None:
        """The reason why AITER does not take an input of this size, or None."""
        if handle.communicator.should_custom_ar(call.x):
            return None
        return Reason(
            "size",
            f"AITER does not take {call.x.nbytes} bytes",
            "its window of sizes to hold them",
            hint="see AITER_CUSTOM_AR_MAX_SIZE and AITER_CUSTOM_AR_MIN_SIZE",
        )

    def run(self, workspace: Workspace[creation.Made], call: Call) -> Mapping[str, Tensor] | None:
        """Call one method. Returns None if AITER returns None, which it does on all ranks or on none."""
        form, tensors, scalars = staged(call), call.tensors, call.scalars
        x, residual = tensors["x"], tensors.get("residual")
        if residual is None and form.kernel.norms:
            residual = workspace.zeros(x)
        return call_kernel(
            form.kernel, workspace.handle.communicator, x, residual, tensors.get("weight"), scalars.get("eps", 0.0),
            scalars.get("weight_bias", 0.0), Form.of(scalars), one_stage=form.one_stage,
        )  # fmt: skip


def staged(call: Call) -> Staged:
    """The call's kernel, with its number of stages."""
    assert isinstance(call.kernel, Staged)
    return call.kernel


COMMUNICATORS = Workspaces(Aiter())
