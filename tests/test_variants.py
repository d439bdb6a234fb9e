"""Strategies with variants: what they share is declared once and asked once, and each keeps a name of its own."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib import resources
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fusion_core import (
    Device,
    FusionConfig,
    MultipleOf,
    Registry,
    Requirement,
    Site,
    Stage,
    Strategy,
    Variant,
    WorldSize,
    ops,
)
from fusion_core.patterns.plain import all_reduce
from fusion_core.plugins import asking
from fusion_core.plugins.fingerprint import declaration
from fusion_core.plugins.registry import GROUP
from fusion_core.tables.schema import UNFUSED
from tests.corpus.case import reduce
from tests.support.graphs import fuse, registry
from tests.variants import BACKENDS, NORM, PATTERNS, SUMS, Counted, acme, asked, expanded, ran, site, total

pytestmark = pytest.mark.usefixtures("one_rank")


def test_there_are_few_strategies_and_each_runs_one_pattern() -> None:
    declared = [
        each for backend in Registry.load(FusionConfig(order=BACKENDS)).backends.values() for each in backend.declared
    ]
    assert len(declared) <= 45
    assert len(expanded()) >= 136, "none of the ways to run a pattern is lost"
    assert {each.pattern for each in declared} == PATTERNS.keys()


def test_every_name_in_the_shipped_tables_is_one_that_runs() -> None:
    names = expanded().keys()
    tables = list((resources.files("fusion_core.tables") / "shipped").iterdir())
    assert tables
    for table in tables:
        measured = {name for row in json.loads(table.read_text(encoding="utf-8"))["rows"] for name in row["us"]}
        assert len(measured) > 10
        assert measured - {UNFUSED} - names == set()


def test_the_variants_of_a_strategy_hold_the_same_requirements() -> None:
    """By identity, which is what lets a site be asked once."""
    for backend in Registry.load(FusionConfig(order=BACKENDS)).backends.values():
        for strategy in backend.declared:
            for each in strategy.expanded():
                shared = each.requires[: len(strategy.requires)]
                assert [*map(id, shared)] == [*map(id, strategy.requires)]


def test_a_variant_is_the_strategy_with_its_own_beside() -> None:
    plain, two_shot, lanes = SUMS.expanded()
    assert [each.name for each in (plain, two_shot, lanes)] == ["acme.sum", "acme.sum_two_shot", "acme.sum_lanes"]
    assert [each.rank for each in (plain, two_shot, lanes)] == [0, -1, -2]
    assert [each.arguments for each in (plain, two_shot, lanes)] == [
        {"lanes": 4},
        {"lanes": 4, "two_shot": True},
        {"lanes": 8},
    ]
    assert two_shot.requires == (MultipleOf("x", -1, 8), WorldSize(1, 2))
    assert two_shot.untested == "no Acme 2 was at hand; no switch was at hand"
    assert (plain.switch, lanes.switch) == (None, "acme.lanes")
    assert (plain.batch_invariant, lanes.batch_invariant) == (False, True)
    assert all(each.variants == () for each in (plain, two_shot, lanes))
    assert plain.expanded() == (plain,)


def test_its_outputs_and_its_impl_may_be_others() -> None:
    def out(x: Tensor, weight: Tensor | None, eps: float, *, group: str) -> Any: ...

    strategy = Strategy(
        NORM.name,
        "acme.norm",
        out,
        outputs=("reduced",),
        variants=(Variant(""), Variant("out", outputs=("normed", "reduced"), impl=total)),
    )
    plain, other = strategy.expanded()
    assert (plain.outputs, plain.impl) == (("reduced",), out)
    assert (other.outputs, other.impl) == (("normed", "reduced"), total)


def test_a_strategy_refuses_by_what_it_shares_and_by_its_own() -> None:
    plain, two_shot, _ = SUMS.expanded()
    wrong = replace(site(9, 20), world_size=4)
    assert [str(reason) for reason in plain.cannot(wrong, all_reduce)] == [
        "x.shape[-1] is 20, needs a multiple of 8",
        "x has 9 tokens, needs at most 8 tokens",
    ]
    assert [str(reason) for reason in two_shot.cannot(wrong, all_reduce)] == [
        "x.shape[-1] is 20, needs a multiple of 8",
        "world size is 4, needs 1 or 2",
    ]


def test_what_two_processes_compare_tells_variants_apart_and_names_no_address() -> None:
    declared = {each.name: repr(declaration(each)) for each in SUMS.expanded()}
    assert len(set(declared.values())) == 3
    assert "'two_shot': True" in declared["acme.sum_two_shot"]
    assert not any(" at 0x" in text for text in declared.values())


def test_the_strategy_of_the_documentation_loads() -> None:
    found = registry(EntryPoint("acme", "tests.docs.variants", GROUP), config=FusionConfig(strict=True))
    names = [each.name for each in found.strategies("all_reduce_add_rms_norm")]
    assert names == ["acme.rms_norm", "acme.rms_norm_two_shot", "acme.rms_norm_overlap"]


def model(x: Tensor) -> Tensor:
    return reduce(x) * 2


@pytest.mark.parametrize(("rows", "expected"), [(4, (False, 4)), (16, (True, 4))])
def test_its_arguments_reach_the_kernel_in_a_compiled_graph(monkeypatch: Any, rows: int, expected: Any) -> None:
    ran.clear()
    fused = fuse(model, torch.ones(rows, 8), using=acme(monkeypatch, SUMS))
    assert ran == [expected]
    assert fused.site.strategy == ("acme.sum_two_shot" if rows > 8 else "acme.sum")
    assert torch.equal(fused.results, torch.full((rows, 8), 2.0))


def test_its_arguments_reach_the_kernel_where_the_token_count_is_known_only_at_run_time(monkeypatch: Any) -> None:
    ran.clear()
    x = torch.ones(4, 8)
    torch._dynamo.mark_dynamic(x, 0)
    fused = fuse(model, x, using=acme(monkeypatch, SUMS, options=("acme.lanes",)))
    assert [(choice.first, choice.strategy) for choice in fused.site.choices] == [
        (1, "acme.sum"),
        (9, "acme.sum_two_shot"),
    ]
    assert ran == [(False, 4)]


def test_its_arguments_reach_the_kernel_in_eager_code(monkeypatch: Any) -> None:
    found = acme(monkeypatch, SUMS)
    monkeypatch.setattr(ops, "_registry_for", lambda config: found)
    ran.clear()
    for rows in (4, 16):
        ops.all_reduce(torch.ones(rows, 8), group=torch.distributed.group.WORLD, config=FusionConfig(order=("acme",)))
    assert ran == [(False, 4), (True, 4)]


def test_a_report_says_of_each_variant_why_it_does_not_run(monkeypatch: Any) -> None:
    fused = fuse(model, torch.ones(16, 8), using=acme(monkeypatch, SUMS))
    found = {each.strategy: (each.stage, [str(reason) for reason in each.reasons]) for each in fused.site.decisions}
    bare = {name: why for name, why in found.items() if name and name.startswith("acme.")}
    assert bare["acme.sum"] == (Stage.REQUIRES, ["x has 16 tokens, needs at most 8 tokens"])
    assert bare["acme.sum_two_shot"] == (Stage.CHOSEN, [])
    assert bare["acme.sum_lanes"][0] is Stage.OPTION


def counted(count: int) -> Strategy:
    def ways() -> tuple[Variant, ...]:
        return tuple(Variant(f"way{n}" if n else "", {"lanes": n}, (own[n],), rank=-n) for n in range(count))

    own = [Counted(f"own {n}") for n in range(count)]
    return Strategy(
        "all_reduce", "acme.sum", total, (Counted("shared"), Counted("rows", 8)), (Counted("fast", 4),), variants=ways()
    )


@pytest.mark.parametrize("rows", [4, 16])
def test_what_variants_share_is_asked_once_at_a_site(monkeypatch: Any, rows: int) -> None:
    using = acme(monkeypatch, counted(6))
    asked.clear()
    fuse(model, torch.ones(rows, 8), using=using)
    expected = {f"{name} at {rows}": 1 for name in ("shared", "rows", *(f"own {n}" for n in range(6)))}
    assert asked == expected | ({f"fast at {rows}": 1} if rows == 4 else {})


def test_a_site_asks_the_backends_here_at_most_half_of_what_their_strategies_require(monkeypatch: Any) -> None:
    """Each requirement object once: with every strategy declared alone, as many as all of them hold were asked."""
    pattern = "all_reduce_add_rms_norm"
    using = Registry.load(FusionConfig(order=BACKENDS))
    using._available |= {(name, Device("cpu")): () for name in BACKENDS}
    held = [id(requirement) for strategy in using.strategies(pattern) for requirement in strategy.requires]
    questions: list[int] = []

    def answered(requirement: Requirement, site: Site) -> None:
        if site.pattern == pattern and id(requirement) in held:
            questions.append(id(requirement))

    monkeypatch.setattr(asking, "answered", answered)
    x = torch.ones(4, 64)
    fuse(lambda x, r, w: functional.rms_norm(reduce(x) + r, (64,), w), x, x, torch.ones(64), using=using)
    assert len(questions) == len(set(held)) <= len(held) // 2


def test_what_variants_share_is_asked_once_at_each_token_count(monkeypatch: Any) -> None:
    def questions(count: int) -> Counter[str]:
        x = torch.ones(4, 8)
        torch._dynamo.mark_dynamic(x, 0)
        using = acme(monkeypatch, counted(count))
        asked.clear()
        fuse(model, x, using=using)
        return Counter({name: times for name, times in asked.items() if not name.startswith("own")})

    one = questions(1)
    assert any(name.startswith("rows at 8") for name in one)
    assert questions(6) == one
