import types
from importlib.metadata import EntryPoint

import pytest
import torch

from fusion_core import DType, FusionConfig, MultipleOf, Registry, Strategy, WorldSize, hookimpl
from fusion_core.plugins.registry import GROUP
from fusion_core.plugins.support_table import support_table


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


def _cells(registry, pattern):
    lines = support_table(registry).splitlines()
    row = next(line for line in lines if line.startswith(f"| `{pattern}` |"))
    return dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], row)), strict=True))


def test_a_cell_says_what_is_required_and_what_that_implies(registry):
    cell = _cells(registry, "all_reduce_rms_norm")["acme"]
    assert cell.startswith(
        "x in bfloat16 or float16; x.shape[-1] a multiple of 8; live outputs among normed; weight_bias 0.0"
    )


def test_nothing_required_and_no_strategy(registry):
    assert _cells(registry, "all_reduce_rms_norm")["reference"] == "any"
    assert _cells(registry, "all_reduce_add_rms_norm")["acme"] == "—"


def test_several_strategies_come_by_rank(registry):
    assert _cells(registry, "all_reduce")["acme"] == "`acme.fast`: world size 2 or 4<br>`acme.slow`: any"


def test_what_all_of_them_require_is_said_once(monkeypatch):
    acme = types.ModuleType("acme_plugin")
    common = (DType("x", torch.bfloat16), MultipleOf("x", dim=-1, of=8))
    acme.fusion_strategies = hookimpl(
        lambda: [
            Strategy("all_reduce", "acme.plain", _sum, common),
            Strategy("all_reduce", "acme.fast", _sum, (*common, WorldSize(2)), rank=1, option="fast"),
            Strategy("all_reduce", "acme.new", _sum, common, rank=2, untested="no Acme 2 was at hand"),
        ]
    )
    monkeypatch.setitem(__import__("sys").modules, "acme_plugin", acme)
    declared = Registry.of([EntryPoint("acme", "acme_plugin", GROUP)], FusionConfig())
    assert _cells(declared, "all_reduce")["acme"] == (
        "x in bfloat16; x.shape[-1] a multiple of 8"
        "<br>`acme.new`: untested on hardware: no Acme 2 was at hand"
        "<br>`acme.fast`: world size 2; option acme.fast"
        "<br>`acme.plain`: nothing else"
    )
