"""The memory of this backend: how a workspace is made, measured and freed, and one call of its kernel."""

from torch import Tensor, nn

from fusion_core import Reason
from fusion_core.workspaces import Call, Exchange, Provider, Workspace, Workspaces
from fusion_shm.memory import VERSION, SharedMemory


class Shm(Provider[SharedMemory]):
    name = "shm"
    least = 1 << 16  # bytes of x that the smallest workspace takes

    def facts(self, call: Call, size: int) -> tuple[dict[str, object], Reason | None]:
        """What must be equal on all ranks, and the reason if this rank cannot make a workspace."""
        return {"size": size, "version": VERSION}, None

    def create(self, call: Call, size: int, exchange: Exchange) -> SharedMemory:
        """Runs on all ranks together. If it raises on one of them, no rank uses a workspace."""
        memory = SharedMemory(size, exchange.rank)
        memory.attach(exchange.allgather(memory.path))
        exchange.barrier()  # every rank has opened all of them
        return memory

    def free(self, handle: SharedMemory) -> None:
        handle.close()

    def memory(self, handle: SharedMemory) -> int:
        return handle.size

    def run(self, workspace: Workspace[SharedMemory], call: Call) -> dict[str, Tensor]:
        """One call of the kernel; fusion_core compares it with the pattern before the first use."""
        x, residual, weight = (call.tensors[name] for name in ("x", "residual", "weight"))
        residual_out = workspace.handle.all_reduce(x) + residual
        wide = nn.functional.rms_norm(residual_out.float(), weight.shape, weight.float(), call.scalars["eps"])
        return {"normed": wide.to(x.dtype), "residual_out": residual_out}


WORKSPACES = Workspaces(Shm())
