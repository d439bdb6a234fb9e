"""The workers' job that compiles a graph with a strategy. Imports no test library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_core._torch.inductor import CustomGraphPass, post_grad_only
from fusion_core.dispatch.named import strategy_of
from fusion_core.emit.pairing import PROVENANCE, plan_of
from fusion_core.fusion_pass import FusionPass
from fusion_core.patterns.definition import GROUP
from fusion_core.report.record import SiteReport
from fusion_core.samples.tensors import Values
from fusion_core.site import Site
from fusion_core.testing.jobs import Outcome, definition, operator_name, tensors, wide
from fusion_core.testing.subject import Subject
from fusion_core.testing.tolerance import excess
from fusion_core.testing.truncation import truncated, truncates


@dataclass
class Compiled:
    """The result of compiling a model that contains the pattern.

    Attributes:
        site: The pass's report of the site.
        targets: Operators in the graph that came from the strategy.
        outcome: The results, compared with the oracle.
    """

    site: SiteReport | None
    targets: list[str]
    outcome: Outcome


def compile_it(subject: Subject, site: Site, values: Values) -> Compiled:
    """Compile the pattern's own definition up to Inductor's post-grad graph, with only this strategy."""
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    pattern = subject.pattern
    look = _Look(FusionPass(registry=subject.alone()))
    given = tensors(site, values)

    def model(**own: Tensor) -> tuple[Tensor, ...]:
        returned = pattern.function(**{**dict.fromkeys(pattern.tensors), **own}, **site.attributes, **{GROUP: group})
        results = dict(zip(pattern.outputs, returned if isinstance(returned, tuple) else (returned,), strict=True))
        return tuple(results[name] for name in site.outputs)

    torch.compiler.reset()
    with torch.no_grad():
        returned = torch.compile(model, backend=post_grad_only(look), fullgraph=True)(**given)
    outcome = Outcome()
    results = dict(zip(site.outputs, returned, strict=True))
    own = definition(pattern, site, given, group)
    oracle = definition(pattern, site, wide(pattern, given), group, exact=True)
    arguments = {**given, **site.attributes}
    definitions = [own, *([truncated(pattern, site, given, group)] if truncates(site) else ())]
    outcome.excesses = excess(pattern, tuple(site.outputs), {**own, **results}, definitions, oracle, arguments)
    return Compiled(look.site, look.targets, outcome)


def operators(node: torch.fx.Node) -> list[str]:
    """The operators of the kernels that a node runs; its own operator if it runs none."""
    if (plan := plan_of(node)) is None:
        return [str(node.target)]
    kernels = [name for _, name in plan.paths if name is not None]
    return [f"{found}.default" if (found := operator_name(strategy_of(name).impl)) else name for name in kernels]


class _Look(CustomGraphPass):
    """Runs the pass and records the operators that it inserted."""

    def __init__(self, own: FusionPass) -> None:
        self.own = own
        self.site: SiteReport | None = None
        self.targets: list[str] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        report = self.own.run(graph)
        self.site = next(iter(report.sites), self.site)
        self.targets += [each for node in graph.nodes if PROVENANCE in node.meta for each in operators(node)]

    def uuid(self) -> None:
        """None: nothing is cached."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Look:
        return self
