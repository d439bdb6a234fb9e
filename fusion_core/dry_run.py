"""A dry run: makes every decision, and every rewrite in a copy of the graph."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from fusion_core._torch import inductor
from fusion_core._torch.dynamo import uncompiled, without_limits
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
    """Report what fusion would do to a model, without doing it.

    The model is captured as ``torch.compile`` would capture it, up to Inductor's post-grad passes, and runs once,
    unfused and without code generation. Under tensor parallelism every rank must call this. Each strategy is traced and
    placed in a copy of the graph, so the report names none that cannot be placed. A model that compiles to several
    graphs gets one report that covers all of them.

    Gradients, inference mode and autocast are those around the call, as for ``torch.compile``.

    Args:
        model: A module or function. If it is a compiled module, the module that was compiled is captured.
        *args: Its arguments.
        config: Which backends may run, and how.
        dynamic: As for ``torch.compile``. None: every size is static, except those marked by
            `torch._dynamo.mark_dynamic`, as on a first call. True: every size is symbolic, as a later call with other
            sizes may make it. False: every size is static.
        **kwargs: Its keyword arguments.

    Returns:
        The report; its ``origin`` is ``"explained"``.
    """
    fusion_pass = FusionPass(config, dry_run=True)
    found: list[Report] = []

    def look(graph: torch.fx.Graph) -> None:
        found.append(fusion_pass.run(graph))

    compiled = torch.compile(_fresh(_call), backend=inductor.post_grad_only(_Look(look)), dynamic=dynamic)
    with without_limits():  # past its limits Dynamo would run the model eagerly
        compiled(uncompiled(model), args, kwargs)
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
    """The report with its graph's number: each graph uses the same node names."""
    sites = tuple(dataclasses.replace(site, graph=number) for site in report.sites)
    merges = tuple(dataclasses.replace(merge, graph=number) for merge in report.merges)
    return dataclasses.replace(report, sites=sites, merges=merges)


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _fresh(function: Any) -> Callable[..., Any]:
    """A copy of the function with its own code object and name.

    Dynamo counts compiled graphs per code object, and a dry run must not count towards a model's limit. It also
    remembers, by name, which numbers differed between calls and makes them symbolic; another model's epsilon must not
    make this one's symbolic.
    """
    name = f"{function.__name__}_{next(_numbers)}"
    return FunctionType(function.__code__.replace(co_name=name), function.__globals__)


_numbers = itertools.count()


class _Look(inductor.CustomGraphPass):
    """A pass that reads the graph and does not change it."""

    def __init__(self, look: Callable[[torch.fx.Graph], None]) -> None:
        self.look = look

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.look(graph)

    def uuid(self) -> None:
        """None: nothing of a dry run is cached."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Look:
        return self
