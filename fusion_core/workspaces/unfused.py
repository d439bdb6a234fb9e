"""A call without a workspace: torch's all_reduce, then one Inductor kernel for the rest of the pattern."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from fusion_core.workspaces.call import Call

Run = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]]


class Unfused:
    """The unfused paths of a backend's calls, each compiled once in this process."""

    def __init__(self) -> None:
        self._paths: dict[Hashable, Run] = {}

    def __call__(self, call: Call) -> dict[str, Tensor]:
        """The call's outputs by name, in memory that no later call overwrites."""
        pattern = call.pattern
        live = pattern.outputs if call.outputs is None else call.outputs
        names = tuple(name for name in pattern.tensors if name != "x" and name in call.tensors)
        form = (pattern, live, names, tuple(call.scalars.items()), call.group)
        if form not in self._paths:
            self._paths[form] = _path(call, live, names)
        results = self._paths[form](call.x, [call.tensors[name] for name in names])
        return dict(zip(live, results, strict=True))


def _path(call: Call, live: tuple[str, ...], names: tuple[str, ...]) -> Run:
    from fusion_core.dispatch.bound_pattern import BoundPattern
    from fusion_core.dispatch.path import ExecutionPath  # imports Inductor, which a machine without a GPU may lack
    from fusion_core.dispatch.strides import Strides

    place = BoundPattern(call.pattern, live, names, dict(call.scalars), call.group)
    path, strides = ExecutionPath(place, None, overwrites=False), Strides(place)

    def run(x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # without rows no rank has anything to send
        results = path(x.contiguous(), others) if x.numel() else place.alone(x, *others)
        return strides.settled(x, others, results)

    return run
