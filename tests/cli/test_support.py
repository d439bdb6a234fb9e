import types
from importlib.metadata import EntryPoint

import pytest
import torch

from fusion_core import (
    DType,
    FusionConfig,
    LiveOutputs,
    MultipleOf,
    Registry,
    Strategy,
    Tokens,
    Variant,
    WorldSize,
    hookimpl,
)
from fusion_core.plugins.registry import GROUP
from fusion_core.plugins.support_table import support_cells, support_table


def _norm(x, weight, eps, *, group):
    return x


def _sum(x, *, group):
    return x


@pytest.fixture
def registry(monkeypatch):
    acme = types.ModuleType("acme_plugin")

    @hookimpl
    def fusion_strategies():
        needs = (DType("x", torch.bfloat16, torch.float16), MultipleOf("x", dim=-1, of=8))
        yield Strategy("all_reduce_rms_norm", "acme.norm", _norm, needs, outputs=("normed",))
        yield Strategy("all_reduce", "acme.slow", _sum)
        yield Strategy("all_reduce", "acme.fast", _sum, (WorldSize(2, 4),), rank=1)

    acme.fusion_strategies = fusion_strategies
    monkeypatch.setitem(__import__("sys").modules, "acme_plugin", acme)
    points = [EntryPoint("acme", "acme_plugin", GROUP), EntryPoint("reference", "fusion_reference", GROUP)]
    return Registry.of(points, FusionConfig())


def _rows(text):
    """Every row of every table: its first cell → the others."""
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    return {first: others[0] if len(others) == 1 else others for first, *others in rows}


def _loaded(monkeypatch, *strategies):
    acme = types.ModuleType("acme_plugin")
    acme.fusion_strategies = hookimpl(lambda: strategies)
    monkeypatch.setitem(__import__("sys").modules, "acme_plugin", acme)
    return Registry.of([EntryPoint("acme", "acme_plugin", GROUP)], FusionConfig())


def test_which_backend_has_which_pattern(registry):
    rows = _rows(support_table(registry))
    assert rows["pattern"] == ["acme", "reference"]
    assert rows["`all_reduce_rms_norm`"] == ["yes", "yes"]
    assert rows["`all_reduce_add_rms_norm`"] == ["—", "yes"]


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "yes"),
        ({"untested": "no Acme 2 was at hand"}, "untested"),
        ({"option": "fast"}, "option acme.fast"),
        ({"variants": (Variant("", untested="no Acme 2 was at hand"), Variant("fast", option="fast"))}, "untested"),
        ({"variants": (Variant("new", untested="no Acme 2 was at hand"), Variant(""))}, "yes"),
    ],
)
def test_what_the_user_has_without_an_option(monkeypatch, fields, state):
    declared = _loaded(monkeypatch, Strategy("all_reduce", "acme.sum", _sum, **fields))
    assert _rows(support_table(declared))["`all_reduce`"] == state


def test_a_row_says_what_is_required_and_what_that_implies(registry):
    outputs, requires = _rows(support_table(registry))["`acme.norm` (`all_reduce_rms_norm`)"]
    assert outputs == "normed"
    assert requires == "x in bfloat16 or float16; x.shape[-1] a multiple of 8; weight_bias 0.0; norm_dtype None"


def test_where_nothing_is_required(registry):
    rows = _rows(support_table(registry))
    assert rows["`acme.slow` (`all_reduce`)"] == ["reduced", "nothing"]
    assert rows["`acme.fast` (`all_reduce`)"] == ["reduced", "world size 2 or 4"]
    assert rows["`reference.all_reduce_bias`"] == ["sum, reduced", "nothing"]


def test_what_all_strategies_require_is_said_once(monkeypatch):
    common = (DType("x", torch.bfloat16), MultipleOf("x", dim=-1, of=8))
    text = support_table(
        _loaded(
            monkeypatch,
            Strategy("all_reduce", "acme.plain", _sum, common),
            Strategy("all_reduce", "acme.fast", _sum, (*common, WorldSize(2)), rank=1, option="fast"),
            Strategy("all_reduce", "acme.new", _sum, common, rank=2, untested="no Acme 2 was at hand"),
        )
    )
    assert "Every strategy requires: x in bfloat16; x.shape[-1] a multiple of 8." in text
    assert text.count("x in bfloat16") == 1
    rows = _rows(text)
    assert rows["strategy"] == ["outputs", "requires besides"]
    assert rows["`acme.plain` (`all_reduce`)"] == ["reduced", "nothing"]
    assert rows["`acme.fast` (`all_reduce`)"] == ["reduced", "world size 2; option acme.fast"]
    assert rows["`acme.new` (`all_reduce`)"] == ["reduced", "untested on hardware: no Acme 2 was at hand"]


def test_what_variants_require_is_said_once_by_their_names(monkeypatch):
    few, eight, both = Tokens(most=8), MultipleOf("x", dim=-1, of=8), ("normed", "reduced")

    def variants(*own):
        return (
            Variant(""),
            Variant("two_shot", requires=(few,), untested="no switch was at hand"),
            Variant("out", outputs=both, requires=own),
            Variant("out_two_shot", outputs=both, requires=(few, *own)),
        )

    text = support_table(
        _loaded(
            monkeypatch,
            Strategy("all_reduce_rms_norm", "acme.all_reduce_rms_norm", _norm, (eight,), variants=variants()),
            Strategy(
                "all_reduce_rms_norm", "acme.b", _norm, (WorldSize(2),), variants=variants(WorldSize(2, 4)), outputs=("normed",)
            ),
        )
    )  # fmt: skip
    rows = _rows(text)
    assert rows["`acme.b` (`all_reduce_rms_norm`)"][1].endswith(
        "world size 2 or 4 (`_out…`); gives reduced too (`_out…`)"
    )
    assert rows["`_two_shot`"] == "at most 8 tokens; untested on hardware: no switch was at hand"
    assert (rows["plain"], rows["`_out`"], rows["`_out_two_shot`"]) == ("nothing", "nothing", "at most 8 tokens")


def test_a_requirement_of_all_variants_but_some_names_those(monkeypatch):
    own = (
        Variant("", requires=(WorldSize(2),)),
        Variant("b", requires=(WorldSize(2),)),
        Variant("out"),
        Variant("out_b"),
    )
    strategy = Strategy("all_reduce", "acme.sum", _sum, variants=own)
    other = Strategy("all_reduce", "acme.total", _sum, variants=tuple(Variant(each.name) for each in own))
    rows = _rows(support_table(_loaded(monkeypatch, strategy, other)))
    assert rows["`acme.sum` (`all_reduce`)"] == ["reduced", "world size 2 (not `_out…`)"]


def test_live_outputs_that_the_author_requires_are_printed(monkeypatch):
    strategy = Strategy("all_reduce_rms_norm", "acme.norm", _norm, (LiveOutputs("normed"),))
    outputs, requires = _rows(support_table(_loaded(monkeypatch, strategy)))["`acme.norm` (`all_reduce_rms_norm`)"]
    assert outputs == "normed, reduced"
    assert requires.startswith("live outputs among normed")


def test_nothing_that_a_strategy_requires_is_left_out():
    every = Registry.load(FusionConfig(order=("aiter", "flashinfer", "reference")))
    text = support_table(every)
    for cells in support_cells(every).values():
        for backend, strategies in cells.items():
            section = text.partition(f"## {backend}\n")[2].partition("\n## ")[0]
            for words in {each for requires in strategies.values() for each in requires}:
                if not words.startswith("live outputs among "):  # in the column of outputs
                    assert all(part in section for part in words.removeprefix("untested on hardware: ").split("; "))


def test_the_page_of_the_backends_here_can_be_read():
    text = support_table(Registry.load(FusionConfig(order=("aiter", "flashinfer", "reference"))))
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 800
    assert len(text) <= 12_000
