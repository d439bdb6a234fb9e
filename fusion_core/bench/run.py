"""Compiling a model with fusion_core and without, and measuring both, batch size by batch size."""

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
from fusion_core.bench import outputs
from fusion_core.bench.result import Fusion, Outcome, Row
from fusion_core.bench.timing import Clock, largest, rounds
from fusion_core.config import FusionConfig
from fusion_core.report import history
from fusion_core.user_code import Call

FIRST_CALLS = 3
"""To compile, to warm up, and to record the CUDA graph."""

Build = Callable[[int | None], Call]
"""Gives the model and its arguments for a batch size."""
Stage = Callable[[str], AbstractContextManager[object]]
"""Around what takes long; given what to call it."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        config: Of fusion_core's side.
        mode: Of torch.compile, for both sides; None for ``"reduce-overhead"`` (CUDA graphs) where the call has tensors
            on a GPU, else ``"default"``.
        dynamic: One graph for all batch sizes, instead of one for each.
        rounds: Of each side, by turns.
        seconds: What the calls of a side take in a round.
        most_difference: The most by which the results may differ; None for what the dtypes explain.
        budget: Seconds from ``began`` on, after which no batch size is begun.
        began: By `time.monotonic`.
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
    """Measure every batch size that there is time for. Every rank calls it, and gets the same.

    No compiled graph is left behind: those that hold a collective in a CUDA graph would keep a process group from
    being destroyed.
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
                    sides = None  # and with it the old model, before there is a new one
                    forget()
                with stage(f"{words}building"):
                    sides = _Sides.of(plan, build(batch), sides)
                rows.append(_row(plan, sides, batch, words, stage))
                longest = max(longest, time.monotonic() - start)
                mode, device = sides.mode, "cuda" if sides.clock.on_gpu else "cpu"
        finally:
            sides = None
            forget()
    return Outcome(tuple(rows), tuple(left_out), mode, device)


def forget() -> None:
    """Drop every compiled graph of this process. Waits for nothing: after an error another rank may hang."""
    torch._dynamo.reset()
    gc.collect()


@contextlib.contextmanager
def _dynamo(plan: Plan) -> Iterator[None]:
    """Dynamo's settings for the time of a run, the same for both sides.

    With ``dynamic=True`` torch makes every Python float an input of the graph, an epsilon too, and no kernel takes one
    that is known only at run time.
    """
    import torch._dynamo.config as settings

    changes: dict[str, Any] = {"recompile_limit": 1000, "accumulated_recompile_limit": 1000}
    if plan.dynamic:
        changes["specialize_float"] = True
    with settings.patch(**changes), torch.no_grad():
        yield


def _time_left(plan: Plan, longest: float) -> bool:
    """Whether another batch size fits, as the slowest rank's clock has it."""
    spent = largest(time.monotonic() - plan.began + longest)
    return plan.budget is None or spent < plan.budget


class _Sides:
    """One model, compiled twice. Two functions with code of their own: Dynamo keeps what it compiled by code."""

    def __init__(self, plan: Plan, call: Call) -> None:
        model: Any = call.model
        for wrapper in ("_orig_mod", "_torchdynamo_orig_callable"):  # of what is compiled already
            model = getattr(model, wrapper, model)
        self.call = call
        self.clock = Clock(any(tensor.is_cuda for tensor in _all_tensors(call)))
        self.mode = plan.mode or ("reduce-overhead" if self.clock.on_gpu else "default")
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
        """Those of before with other arguments, where the model is the same one; else new ones."""
        if before is None or before.call.model is not call.model:
            return cls(plan, call)
        before.call = call
        return before

    def reports(self, batch: int | None, heard: list[fusion_core.Report]) -> list[fusion_core.Report]:
        """Of the graphs that this batch size runs; what was heard when it was compiled, if it was.

        Dynamo has a graph of its own for a size of 1, whatever is dynamic.
        """
        if heard:
            self._reports[batch == 1] = heard
        return self._reports.get(batch == 1) or next(iter(self._reports.values()), [])

    def step(self, name: str) -> Any:
        """One call of a side."""
        if self.clock.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        return self._compiled[name](self.call.args, self.call.kwargs)


def _all_tensors(call: Call) -> Iterator[torch.Tensor]:
    yield from outputs.tensors((call.args, dict(call.kwargs)))
    if isinstance(call.model, torch.nn.Module):
        yield from call.model.parameters()
        yield from call.model.buffers()


def _row(plan: Plan, sides: _Sides, batch: int | None, words: str, stage: Stage) -> Row:
    from torch._dynamo.utils import counters

    skips_before = counters["inductor"]["cudagraph_skips"]
    compile_s = {}
    heard: list[fusion_core.Report] = []
    for name, title in (("plain", "without fusion_core"), ("fused", "with fusion_core")):
        with stage(f"{words}compiling {title}"), history.collecting() as reports:
            start = time.monotonic()
            for _ in range(FIRST_CALLS):
                sides.step(name)
            sides.clock.meet()
            compile_s[name] = time.monotonic() - start
        heard = reports if name == "fused" else []
    running = sides.reports(batch, heard)
    with stage(f"{words}measuring"):
        first, again = outputs.kept(sides.step("plain")), outputs.kept(sides.step("plain"))
        other = outputs.kept(sides.step("fused"))
        figures, steps = rounds(
            sides.clock,
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
        bool(heard),
        steps,
        compile_s,
        counters["inductor"]["cudagraph_skips"] - skips_before,
    )


def _agreed(difference: float | None) -> float | None:
    """The largest of all ranks' differences; ranks have results of the same form."""
    return None if difference is None else largest(difference)
