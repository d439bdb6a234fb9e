"""One graph for all token counts, with a backend that has a kernel for few rows and one for many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_core import FusionConfig, Reason, Registry, Report, Site, Strategy
from fusion_core.dispatch.plan import Plan
from fusion_core.tables.machine import Machine
from fusion_core.tables.store import to_json
from fusion_core.tables.table import Row, Table
from tests.support.graphs import REFERENCE, plugin, registry
from tests.test_matching import ADD, add_then, norm

c10d = torch.ops._c10d_functional
HIDDEN = 16
ran: list[str] = []


@dataclass(frozen=True)
class Rows:
    """At most so many rows, and more than so many."""

    above: int
    most: int

    def unmet(self, site: Site) -> Reason | None:
        tokens = site.tokens
        if tokens is None or self.above < tokens <= self.most:
            return None
        return Reason("rows", f"{tokens} rows", f"{self.above + 1} to {self.most}")

    def changes_at(self, site: Site) -> tuple[int, ...]:
        return self.above + 1, self.most + 1


def kernel(name: str) -> Callable[..., Any]:
    def run(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str) -> tuple[Tensor, Tensor]:
        ran.append(name)
        total = c10d.wait_tensor(c10d.all_reduce(x, "sum", group)) + residual
        return norm(total, weight, eps), total.clone()

    run.__annotations__ |= {"x": Tensor, "residual": Tensor, "weight": Tensor | None, "eps": float, "group": str}
    run.__annotations__["return"] = tuple[Tensor, Tensor]
    op = torch.library.custom_op(f"fusion_core_tests::by_tokens_{name}", run, mutates_args=())
    op.register_fake(lambda x, residual, weight, eps, group: (torch.empty_like(x), torch.empty_like(x)))
    return op


@torch.library.custom_op("fusion_core_tests::by_tokens_sum", mutates_args=())
def own_sum(x: Tensor, group: str) -> Tensor:
    ran.append("sum")
    return c10d.wait_tensor(c10d.all_reduce(x, "sum", group)).clone()


@own_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


FEW, MANY = kernel("few"), kernel("many")
OUTPUTS = ("normed", "residual_out")


def few(*worthwhile: Any, **more: Any) -> Strategy:
    return Strategy(ADD, "acme.few", FEW, worthwhile=worthwhile, outputs=OUTPUTS, **more)


def many(*worthwhile: Any, **more: Any) -> Strategy:
    return Strategy(ADD, "acme.many", MANY, worthwhile=worthwhile, outputs=OUTPUTS, **more)


def acme(monkeypatch: Any, *strategies: Strategy, config: FusionConfig | None = None) -> Registry:
    return registry(plugin(monkeypatch, "acme", fusion_strategies=lambda: strategies), REFERENCE, config=config)


def given(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, r = (torch.randn(rows, HIDDEN, generator=generator).to(dtype) for _ in range(2))
    return x, r, torch.randn(HIDDEN, generator=generator).to(dtype)


def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
    return add_then(norm)(x * 1, r, w)


class Dynamic:
    """One graph for all token counts, run behind the post-grad passes."""

    def __init__(self, function: Callable[..., Any], using: Registry) -> None:
        from fusion_core import FusionPass
        from fusion_core._torch import inductor

        self.function, self.reports, self.graphs = function, list[Report](), list[torch.fx.Graph]()
        own = FusionPass(registry=using)

        class Look(inductor.CustomGraphPass):
            def __call__(look, graph: torch.fx.Graph) -> None:
                self.reports.append(own.run(graph))
                graph.lint()
                self.graphs.append(graph)

            def uuid(look) -> None:
                return None

            def __deepcopy__(look, memo: Any) -> Any:
                return look

        torch._dynamo.reset()
        self.compiled = torch.compile(function, backend=inductor.post_grad_only(Look()), fullgraph=True)

    def plans(self) -> list[Plan]:
        """What the graph's sites run, from which token count on."""
        calls = [node for graph in self.graphs for node in graph.nodes if "by_tokens_" in str(node.target)]
        return [Plan.of(node.args[2]) for node in calls]

    def __call__(self, rows: int, dtype: torch.dtype = torch.float32) -> list[str]:
        tensors = given(rows, dtype)
        copies = [tensor.clone() for tensor in tensors]
        for tensor in tensors[:2]:
            torch._dynamo.mark_dynamic(tensor, 0)
        ran.clear()
        with torch.no_grad():
            found = self.compiled(*tensors)
            kept, ran_now = list(ran), list(ran)
            expected = self.function(*copies)
        ran[:] = kept
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1.6e-2 if dtype.itemsize == 2 else 1e-4)
        torch.testing.assert_close(list(tensors), copies, rtol=0, atol=0)  # a model's inputs stay as they are
        return ran_now


def table(tmp_path: Path, *points: tuple[int, dict[str, float]]) -> str:
    rows = tuple(Row(ADD, "float32", HIDDEN, tokens, us) for tokens, us in points)
    path = tmp_path / "table.json"
    path.write_text(to_json(Table(Machine.here(1), rows, "2026-11-23T00:00:00+00:00", "recorded")))
    return str(path)
