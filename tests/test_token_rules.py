"""Requirements that depend on the token count, in one graph for all counts: which counts a kernel really ran with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fusion_core import (
    BackendError,
    Contiguous,
    FusionConfig,
    FusionPass,
    MultipleOf,
    Reason,
    Requirement,
    Site,
    SizeBetween,
    Stage,
    Strategy,
    Tokens,
)
from fusion_core._torch import inductor
from fusion_core.dispatch.by_tokens import Runner
from fusion_core.plugins.asking import Answer, Answers, When
from fusion_core.site import TensorMeta
from tests.support.graphs import fuse
from tests.test_matching import ADD, norm
from tests.token_counts import HIDDEN, OUTPUTS, Dynamic, Rows, acme, c10d, few, given, many, model

pytestmark = pytest.mark.usefixtures("one_rank")

counts: list[int] = []
COUNTS = range(1, 301)


@torch.library.custom_op("fusion_core_tests::counted", mutates_args=())
def counted(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    counts.append(x.numel() // x.shape[-1])
    total = c10d.wait_tensor(c10d.all_reduce(x, "sum", group)) + residual
    return norm(total, weight, eps), total.clone()


@counted.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@dataclass(frozen=True)
class Rule:
    """A rule of a plugin that knows nothing of run-time sizes, in one of the ways in which authors write them."""

    name: str
    way: str = "tokens"

    def unmet(self, site: Site) -> Reason | None:
        if self.way == "tokens or None":
            if site.tokens is None:
                return None
            tokens = site.tokens
        elif self.way == "size":
            tokens = site.inputs["x"].shape[0]  # type: ignore[assignment]
        elif self.way == "integers":
            if not all(isinstance(size, int) for size in site.inputs["x"].shape):
                return None
            tokens = site.inputs["x"].shape[0]  # type: ignore[assignment]
        else:
            tokens = site.tokens  # type: ignore[assignment]
        return None if HOLDS[self.name](tokens) else Reason("rule", f"{tokens} tokens", self.name)

    def __str__(self) -> str:
        return self.name


HOLDS: dict[str, Callable[[Any], Any]] = {
    "multiple of 4": lambda tokens: tokens % 4 == 0,
    "odd": lambda tokens: tokens % 2 == 1,
    "a range": lambda tokens: tokens >= 5 and tokens <= 77,
    "two ranges": lambda tokens: tokens < 9 or (tokens > 33 and tokens <= 35),
    "hidden times tokens": lambda tokens: tokens * HIDDEN <= 1000,
    "no power of two": lambda tokens: (tokens & (tokens - 1)) != 0,
    "raises at 7": lambda tokens: 1 // (tokens - 7) <= 1,
    "never": lambda tokens: tokens > 10**9,
}


def strategy(*requires: Requirement, **more: Any) -> Strategy:
    return Strategy(ADD, "acme.counted", counted, requires, outputs=OUTPUTS, **more)


def ask(requirement: Requirement, site: Site) -> Answer:
    return Answers(site).ask(requirement)


def ran_with(dynamic: Dynamic, rows: Any = COUNTS) -> list[int]:
    counts.clear()
    for count in rows:
        dynamic(count)
    return list(counts)


def expected(name: str) -> list[int]:
    return [count for count in COUNTS if count != 7 and HOLDS[name](count)] if "raises" in name else [
        count for count in COUNTS if HOLDS[name](count)
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["tokens", "size", "tokens or None", "integers"])
@pytest.mark.parametrize("name", ["multiple of 4", "odd"])
def test_a_rule_is_right_at_every_count_however_it_is_written(monkeypatch: Any, name: str, way: str) -> None:
    dynamic = Dynamic(model, acme(monkeypatch, strategy(Rule(name, way))))
    rows = [*range(2, 24), 300]
    assert ran_with(dynamic, rows) == [count for count in rows if HOLDS[name](count)]
    assert len(dynamic.reports) == 1, "one graph: no requirement added a guard"


@pytest.mark.parametrize(
    "requirement",
    [
        *(Rule(name) for name in HOLDS if name != "never"),
        Tokens(multiple_of=4),
        Tokens(most=77, least=5),
        Tokens(most=200, least=9, multiple_of=8),
        Tokens(least=299),
    ],
    ids=str,
)
def test_a_kernel_runs_at_exactly_the_counts_of_its_rule(monkeypatch: Any, requirement: Requirement) -> None:
    site = SITE if isinstance(requirement, Tokens) else None
    wanted = [n for n in COUNTS if requirement.unmet(site.at(n)) is None] if site else expected(str(requirement))
    dynamic = Dynamic(model, acme(monkeypatch, strategy(requirement)))
    assert ran_with(dynamic, COUNTS[1:]) == [count for count in wanted if count > 1]  # torch compiles 1 by itself
    assert len(dynamic.reports) == 1


X = TensorMeta((4, HIDDEN), torch.float32, (HIDDEN, 1))
SITE = Site(ADD, "all_reduce", {"x": X, "residual": X}, {"normed": X, "residual_out": X}, {"eps": 1e-5})


def test_where_a_rule_is_not_met_the_next_best_runs(monkeypatch: Any) -> None:
    using = acme(monkeypatch, strategy(Rule("odd"), rank=3), few(Rule("a range"), rank=2), many(Rows(0, 100)))
    dynamic = Dynamic(model, using)
    assert [dynamic(rows) for rows in (2, 3, 6, 78, 101, 102)] == [["many"], [], ["few"], ["many"], [], []]
    assert ran_with(dynamic, (2, 3, 6, 78, 101, 102)) == [3, 101]
    site = dynamic.reports[0].sites[0]
    assert [(each.first, each.strategy, each.asks) for each in site.choices] == [
        (1, "acme.counted", ("odd",)),
        (1, "acme.few", ("a range",)),
        (1, "acme.many", ()),
        (101, "acme.counted", ("odd",)),
        (101, "acme.few", ("a range",)),
        (101, f"reference.{ADD}", ()),
    ]
    words = "from 1: acme.counted in a call with odd, else acme.few in a call with a range, else acme.many; from 101: "
    assert words in " ".join(str(dynamic.reports[0]).split())


def test_a_requirement_that_looks_at_no_run_time_size_is_not_asked_again(monkeypatch: Any) -> None:
    asked: list[Site] = []

    @dataclass(frozen=True)
    class Hidden:
        def unmet(self, site: Site) -> Reason | None:
            asked.append(site)
            return None if site.inputs["x"].shape[-1] == HIDDEN else Reason("hidden", "another")

        def __str__(self) -> str:
            return "hidden size"

    dynamic = Dynamic(model, acme(monkeypatch, strategy(Hidden())))
    before = dynamic(3), len(asked)
    assert ran_with(dynamic, (4, 5, 6)) == [4, 5, 6]
    assert len(asked) == before[1]
    assert dynamic.plans()
    assert all((len(plan.paths), plan.asks) == (1, ()) for plan in dynamic.plans())


def test_a_refusal_of_a_size_that_is_not_known_yet_is_final(monkeypatch: Any) -> None:
    @dataclass(frozen=True)
    class Fixed:
        def unmet(self, site: Site) -> Reason | None:
            return Reason("fixed", "an unknown number of rows", "a known one") if site.tokens is None else None

        def __str__(self) -> str:
            return "a known number of rows"

    dynamic = Dynamic(model, acme(monkeypatch, strategy(Fixed())))
    assert ran_with(dynamic, (3, 4)) == []
    decision = next(d for d in dynamic.reports[0].sites[0].decisions if d.strategy == "acme.counted")
    assert (decision.stage, str(decision.reasons[0])) == (
        Stage.REQUIRES,
        "an unknown number of rows, needs a known one",
    )


def test_a_rule_that_raises_in_a_call_leaves_it_unfused_and_the_report_says_so(monkeypatch: Any) -> None:
    dynamic = Dynamic(model, acme(monkeypatch, strategy(Rule("raises at 7"))))
    assert ran_with(dynamic, (6, 7, 9)) == [6, 9]
    said = " ".join(str(reason) for reason in dynamic.reports[0].sites[0].run_time)
    assert "asked of float32[7, 16]: requirement 'raises at 7' raised ZeroDivisionError: " in said


def test_a_rule_on_a_size_that_no_token_count_gives_is_refused(monkeypatch: Any) -> None:
    @dataclass(frozen=True)
    class Wide:
        def unmet(self, site: Site) -> Reason | None:
            return None if site.inputs["x"].shape[-1] > 8 else Reason("wide", "narrow")

        def __str__(self) -> str:
            return "x wide"

    def alone(x: Tensor) -> Tensor:
        return torch.distributed._functional_collectives.all_reduce(x * 1, "sum", torch.distributed.group.WORLD)

    def impl(x: Tensor, group: str) -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x, "sum", group)).clone()

    using = acme(monkeypatch, Strategy("all_reduce", "acme.wide", impl, (Wide(),)))
    torch._dynamo.reset()
    report = fuse(alone, torch.ones(6, 12), using=using, dynamic=True).reports[0]
    reason = next(d.reasons[0] for d in report.sites[0].decisions if d.strategy == "acme.wide")
    assert str(reason) == (
        "x wide depends on a size that is known only at run time, and is no token count, needs a fixed size; "
        "torch._dynamo.mark_static marks it static"
    )


def test_deterministic_numerics_take_no_strategy_that_some_counts_rule_out(monkeypatch: Any) -> None:
    config = FusionConfig(numerics="deterministic")
    for limit in (Tokens(most=8), Rule("odd")):
        using = acme(monkeypatch, strategy(limit, batch_invariant=True), config=config)
        assert ran_with(Dynamic(model, using), (3, 4)) == []
        fixed = fuse(model, *given(3), using=using).site
        reason = next(d.reasons[0] for d in fixed.decisions if d.strategy == "acme.counted")
        assert str(reason) == (
            f"acme.counted runs at some numbers of tokens only ({limit}), needs one that runs in every batch; "
            "numerics='default' allows it"
        )


def test_a_plan_that_asks_comes_back_from_its_text(monkeypatch: Any) -> None:
    from fusion_core.dispatch import by_tokens
    from fusion_core.dispatch.plan import Plan

    plans: list[Any] = []
    emitted = by_tokens.emitted
    monkeypatch.setattr(by_tokens, "emitted", lambda plan, *rest: (plans.append(plan), emitted(plan, *rest))[1])
    dynamic = Dynamic(model, acme(monkeypatch, strategy(Rule("odd"))))
    dynamic(3)
    (plan,) = plans
    again = Plan.of(plan.text())
    assert again.text() == plan.text()
    x, residual, weight = given(5)
    counts.clear()
    Runner(again)(x, [residual, weight])
    Runner(again)(*[given(4)[0], list(given(4)[1:])])
    assert counts == [5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Tokens has no limit, needs most, least or multiple_of"),
        ({"most": 0}, "most of Tokens is 0, needs a whole number of at least 1"),
        ({"most": True}, "most of Tokens is True, needs a whole number of at least 1"),
        ({"least": -1}, "least of Tokens is -1, needs a whole number of at least 0"),
        ({"multiple_of": 0}, "multiple_of of Tokens is 0, needs a whole number of at least 1"),
        ({"multiple_of": 2.0}, "multiple_of of Tokens is 2.0, needs a whole number of at least 1"),
        ({"most": 8, "least": 9}, "Tokens has no count that is 9 to 8 tokens, needs bounds with one between them"),
        (
            {"most": 15, "least": 9, "multiple_of": 8},
            "Tokens has no count that is 9 to 15 tokens, in multiples of 8, needs bounds with one between them",
        ),
    ],
)
def test_nonsense_is_refused_where_it_is_written(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError) as error:
        Tokens(**arguments)
    assert str(error.value) == message


def test_what_is_asked_when() -> None:
    shapes = ShapeEnv()
    batch, length = (shapes.create_unspecified_symint_and_symbol(n, _source(n), DimDynamic.DYNAMIC) for n in (3, 5))
    unbacked = shapes.create_unbacked_symint()
    one, two = (replace(SITE, inputs={"x": replace(X, shape=shape)}) for shape in ((batch, 8), (batch, length, 8)))
    data = replace(SITE, inputs={"x": replace(X, shape=(unbacked, 8))})
    by_count, each_call = Tokens(most=8), Tokens(multiple_of=4)
    for site in (one, two):
        assert ask(by_count, site) == Answer(When.BY_COUNT, changes=(9,))
        assert ask(each_call, site) == ask(Rule("odd"), site) == Answer(When.EACH_CALL)
    assert ask(by_count, data) == Answer(When.BY_COUNT, changes=(9,))
    assert ask(Rule("odd", "size"), one) == Answer(When.EACH_CALL)
    reasons = [str(ask(Rule("odd", way), site).reason) for site, way in ((two, "size"), (data, "tokens"))]
    found = "odd depends on a size that is known only at run time"
    assert reasons == [
        f"{found}, one of several of x, needs one on the number of tokens alone; "
        "a requirement on Site.tokens or fusion_core.Tokens",
        f"{found}, from data, needs a size that the graph's inputs have; "
        "fusion_core.Tokens(most=..., least=...) states a limit on the token count for such graphs",
    ]
    assert ask(MultipleOf("x", dim=0, of=8), one) == ask(SizeBetween("x", 0, 1, 8), one) == Answer(When.EACH_CALL)
    assert ask(MultipleOf("x", dim=-1, of=8), one) == Answer(When.NOW)
    assert ask(Contiguous("x"), replace(SITE, inputs={"x": replace(X, shape=(batch, 8), stride=(8, 1))})).reason is None
    assert not shapes.guards


def _source(number: int) -> Any:
    return ConstantSource(f"s{number}")


def test_a_size_by_itself_is_asked_at_each_call_of_a_graph_of_three_dimensions(monkeypatch: Any) -> None:
    @dataclass(frozen=True)
    class Length:
        def unmet(self, site: Site) -> Reason | None:
            return None if site.inputs["x"].shape[1] % 3 == 0 else Reason("length", "uneven")

        def __str__(self) -> str:
            return "length in threes"

    torch._dynamo.reset()
    using = acme(monkeypatch, strategy(Length()))
    compiled = torch.compile(model, backend=inductor.post_grad_only(FusionPass(registry=using)), fullgraph=True)
    counts.clear()
    for length in (3, 4, 5, 6):
        x, residual = (torch.ones(2, length, HIDDEN) for _ in range(2))
        for tensor in (x, residual):
            torch._dynamo.mark_dynamic(tensor, 1)
        with torch.no_grad():
            compiled(x, residual, torch.ones(HIDDEN))
    assert counts == [6, 12]
