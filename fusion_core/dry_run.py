"""A dry run: every decision, and every rewrite in a copy of the graph."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from fusion_core import _inductor
from fusion_core.config import FusionConfig
from fusion_core.fusion_pass import FusionPass
from fusion_core.report.report import Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    config: FusionConfig | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Report:
    """What fusion would do to a model, without doing it.

    The model is captured as ``torch.compile`` would capture it, up to Inductor's post-grad passes, and runs once,
    unfused and without code generation; under tensor parallelism every rank must call this. Each strategy is traced and
    placed in a copy of the graph, so that one which cannot be placed is not named. A model that compiles to several
    graphs gets one report over all of them.

    Gradients, inference mode and autocast are those around the call, as for ``torch.compile``.

    Args:
        model: A module or function; of a compiled module, the module itself is taken.
        *args: Its arguments.
        config: Which backends may run, and how.
        dynamic: As for ``torch.compile``. None captures these sizes, but those that `torch._dynamo.mark_dynamic` names,
            as a first call does; True makes every size a symbol, as a call with other sizes may later do; False none.
        **kwargs: Its keyword arguments.

    Returns:
        The report; its ``origin`` is ``"explained"``.
    """
    fusion_pass = FusionPass(config, dry_run=True)
    found: list[Report] = []

    def look(graph: torch.fx.Graph) -> None:
        found.append(fusion_pass.run(graph))

    compiled = torch.compile(_fresh(_call), backend=_inductor.post_grad_only(_Look(look)), dynamic=dynamic)
    # whatever was compiled before, this is captured now: past its limits Dynamo would run it eagerly, in silence
    with torch._dynamo.config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        compiled(getattr(model, "_orig_mod", model), args, kwargs)
    if not found:
        return fusion_pass.run(torch.fx.Graph())
    fullest = max(found, key=lambda report: len(report.sites))
    if len(found) > 1:
        found = [_numbered(report, number) for number, report in enumerate(found, 1)]
    sites = tuple(site for report in found for site in report.sites)
    merges = tuple(merge for report in found for merge in report.merges)
    disagreements = {group: reasons for report in found for group, reasons in report.disagreements.items()}
    tables = {group: table for report in found for group, table in report.tables.items()}
    untuned = {group: reasons for report in found for group, reasons in report.untuned.items()}
    return dataclasses.replace(
        fullest, sites=sites, merges=merges, disagreements=disagreements, tables=tables, untuned=untuned
    )


def _numbered(report: Report, number: int) -> Report:
    """The report of one graph of several: names of nodes come again in each."""
    sites = tuple(dataclasses.replace(site, graph=number) for site in report.sites)
    merges = tuple(dataclasses.replace(merge, graph=number) for merge in report.merges)
    return dataclasses.replace(report, sites=sites, merges=merges)


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _fresh(function: Any) -> Callable[..., Any]:
    """The function with code and a name of its own.

    Dynamo keeps graphs by code, and a dry run must not use up a model's. By name it remembers which numbers have
    differed from one call to the next, and makes those values of run time: another model's epsilon is none of its own.
    """
    name = f"{function.__name__}_{next(_numbers)}"
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__)


_numbers = itertools.count()


class _Look(_inductor.CustomGraphPass):
    """A pass that only looks."""

    def __init__(self, look: Callable[[torch.fx.Graph], None]) -> None:
        self.look = look

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.look(graph)

    def uuid(self) -> None:
        """None: nothing of a dry run is cached."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Look:
        return self
