"""Compiles a model with and without fusion_core, and times both at each batch size."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

import fusion_core
from fusion_core._torch.dynamo import cudagraph_skips, settings, uncompiled
from fusion_core.bench import outputs
from fusion_core.bench.result import Fusion, Outcome, Row
from fusion_core.bench.timing import StepTimer, largest, rounds
from fusion_core.config import FusionConfig
from fusion_core.report import history
from fusion_core.user_code import Call

FIRST_CALLS = 3
"""Calls that compile, warm up and record the CUDA graph."""

Build = Callable[[int | None], Call]
"""Returns the model and its arguments for a batch size."""
Stage = Callable[[str], AbstractContextManager[object]]
"""A context for a long stage, made from the text to show."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        config: The configuration of fusion_core.
        mode: The mode of torch.compile for both sides; None for ``"reduce-overhead"`` (CUDA graphs) if the call has
            tensors on a GPU, else ``"default"``.
        dynamic: One graph for all batch sizes, instead of one for each.
        rounds: Rounds of each side; the sides alternate.
        seconds: Seconds of calls in one round of one side.
        most_difference: The largest difference that passes; None for a limit by dtype.
        budget: Seconds after ``began`` at which no further batch size is started.
        began: The time of `time.monotonic` at the start.
    """

    config: FusionConfig
    mode: str | None
    dynamic: bool
    rounds: int
    seconds: float
    most_difference: float | None
    budget: float | None
    began: float


def run(plan: Plan, batches: Sequence[int | None], build: Build, stage: Stage) -> Outcome:
    """Measure every batch size that there is time for. Every rank calls it, and gets the same outcome.

    All compiled graphs are dropped at the end: a CUDA graph with a collective would keep the process group from being
    destroyed.
    """
    rows: list[Row] = []
    left_out: list[int | None] = []
    longest, mode, device = 0.0, plan.mode or "", ""
    sides: _Sides | None = None
    with _dynamo(plan):
        try:
            for batch in batches:
                if not _time_left(plan, longest):
                    left_out.append(batch)
                    continue
                start = time.monotonic()
                words = "" if batch is None else f"batch {batch}: "
                if sides is not None and not plan.dynamic:
                    sides = None  # frees the old model before the new one is built
                    forget()
                with stage(f"{words}building"):
                    sides = _Sides.of(plan, build(batch), sides)
                rows.append(_row(plan, sides, batch, words, stage))
                longest = max(longest, time.monotonic() - start)
                mode, device = sides.mode, "cuda" if sides.timer.clock.on_gpu else "cpu"
        finally:
            sides = None
            forget()
    return Outcome(tuple(rows), tuple(left_out), mode, device)


def forget() -> None:
    """Drop every compiled graph of this process, without waiting: after an error another rank may hang."""
    torch.compiler.reset()
    gc.collect()


@contextlib.contextmanager
def _dynamo(plan: Plan) -> Iterator[None]:
    """Dynamo's settings during a run, the same for both sides.

    With ``dynamic=True`` torch makes every Python float an input of the graph, including an epsilon, and no kernel
    accepts an epsilon that is known only at run time.
    """
    changes: dict[str, Any] = {"recompile_limit": 1000, "accumulated_recompile_limit": 1000}
    if plan.dynamic:
        changes["specialize_float"] = True
    with settings(**changes), torch.no_grad():
        yield


def _time_left(plan: Plan, longest: float) -> bool:
    """Whether another batch size fits into the budget, by the slowest rank's clock."""
    spent = largest(time.monotonic() - plan.began + longest)
    return plan.budget is None or spent < plan.budget


class _Sides:
    """One model, compiled twice: by two functions, because Dynamo caches graphs by code object."""

    def __init__(self, plan: Plan, call: Call) -> None:
        model = uncompiled(call.model)
        self.call = call
        self.timer = StepTimer(any(tensor.is_cuda for tensor in _all_tensors(call)))
        self.mode = plan.mode or ("reduce-overhead" if self.timer.clock.on_gpu else "default")
        self._reports: dict[bool, list[fusion_core.Report]] = {}
        same: dict[str, Any] = {"mode": self.mode, "dynamic": plan.dynamic}

        def plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            return model(*args, **kwargs)

        def fused(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            return model(*args, **kwargs)

        self._compiled = {
            "plain": torch.compile(plain, **same),
            "fused": fusion_core.compile(fused, plan.config, **same),
        }

    @classmethod
    def of(cls, plan: Plan, call: Call, before: _Sides | None) -> _Sides:
        """The previous sides with new arguments if the model is the same object; else new ones."""
        if before is None or before.call.model is not call.model:
            return cls(plan, call)
        before.call = call
        return before

    def reports(self, batch: int | None, collected: list[fusion_core.Report]) -> list[fusion_core.Report]:
        """Reports of the graphs that this batch size runs, from the compilation for it or for an earlier size.

        Dynamo compiles a separate graph for a size of 1, even if the size is dynamic.
        """
        if collected:
            self._reports[batch == 1] = collected
        return self._reports.get(batch == 1) or next(iter(self._reports.values()), [])

    def step(self, name: str) -> Any:
        """One call of a side."""
        if self.timer.clock.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        return self._compiled[name](self.call.args, self.call.kwargs)


def _all_tensors(call: Call) -> Iterator[torch.Tensor]:
    yield from outputs.tensors((call.args, dict(call.kwargs)))
    if isinstance(call.model, torch.nn.Module):
        yield from call.model.parameters()
        yield from call.model.buffers()


def _row(plan: Plan, sides: _Sides, batch: int | None, words: str, stage: Stage) -> Row:
    skips_before = cudagraph_skips()
    compile_s = {}
    collected: list[fusion_core.Report] = []
    for name, title in (("plain", "without fusion_core"), ("fused", "with fusion_core")):
        with stage(f"{words}compiling {title}"), history.collecting() as reports:
            start = time.monotonic()
            for _ in range(FIRST_CALLS):
                sides.step(name)
            sides.timer.barrier()
            compile_s[name] = time.monotonic() - start
        collected = reports if name == "fused" else []
    running = sides.reports(batch, collected)
    with stage(f"{words}measuring"):
        first, again = outputs.kept(sides.step("plain")), outputs.kept(sides.step("plain"))
        other = outputs.kept(sides.step("fused"))
        figures, steps = rounds(
            sides.timer,
            {"plain": lambda: sides.step("plain"), "fused": lambda: sides.step("fused")},
            plan.rounds,
            plan.seconds,
        )
    dtypes = {tensor.dtype for tensor in (*_all_tensors(sides.call), *first)}
    return Row(
        batch,
        figures["plain"],
        figures["fused"],
        Fusion.of(running),
        _agreed(outputs.difference(first, other)),
        outputs.limit(dtypes) if plan.most_difference is None else plan.most_difference,
        _agreed(outputs.difference(first, again)),
        bool(collected),
        steps,
        compile_s,
        cudagraph_skips() - skips_before,
    )


def _agreed(difference: float | None) -> float | None:
    """The largest of all ranks' differences; None on one rank means None on all."""
    return None if difference is None else largest(difference)
