"""Which patterns and paths there are, and at which places they are measured."""

import pytest
import torch

from fusion_core import ops
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason
from fusion_core.tables import UNFUSED
from fusion_core.tune.plan import IMPORTANT, Plan, tensors
from tests.tuning.acme import ADD, GROUP_FP8
from tests.tuning.jobs import registry

CPU = torch.device("cpu")


def plan(dtype=torch.bfloat16, order=("acme", "reference"), group="0"):
    return Plan(registry(order), dtype, CPU, group, 2)


def form(strategy):
    own = plan()
    pattern = own.registry.patterns[strategy.pattern]
    (column,) = [each for each in own.columns(pattern) if each.name == strategy.name]
    return column.form


def test_frequent_patterns_come_first_and_others_where_somebody_has_a_strategy():
    names = [pattern.name for pattern in plan().patterns([4096], 1)]
    assert names == [*IMPORTANT[:4], GROUP_FP8]
    assert [pattern.name for pattern in plan().patterns([100], 1)] == [*IMPORTANT[:4]]  # no groups of 128 in it
    assert plan(order=()).patterns([4096], 1) == ()


def test_definitions_are_no_paths_and_bare_all_reduces_serve_every_pattern():
    own = plan()
    names = [column.name for column in own.columns(own.registry.patterns[ADD])]
    assert names[:3] == [UNFUSED, "acme.with_norm", "acme.right"]
    assert names[-1] != f"reference.{ADD}"
    assert "reference.all_reduce_in_rank_order" in names
    assert not {"acme.switched_off", "reference.all_reduce", f"reference.{ADD}"} & {*names}
    bare = [column.name for column in own.columns(own.registry.patterns["all_reduce"])]
    assert len(bare) == len(set(bare))


def test_a_backend_that_cannot_be_used_has_no_paths():
    own = plan()
    own.registry._available["acme", own._facts] = (Reason("driver", "found no driver", "one"),)
    assert not [c for c in own.columns(own.registry.patterns[ADD]) if c.name.startswith("acme.")]


def test_a_place_is_what_the_strategies_are_made_for():
    """Scalars and live outputs that a strategy needs; the unfused path and bare all_reduces at the usual one of them."""
    own = plan()
    columns = {column.name: column.form for column in own.columns(own.registry.patterns[GROUP_FP8])}
    assert columns["acme.groups"].live == ("quantized", "scale", "reduced")
    assert columns["acme.groups_out"].live == ("quantized", "scale", "normed", "reduced")
    assert dict(columns["acme.groups"].scalars)["scale_format"] == "ue8m0_packed"
    assert columns[UNFUSED] == columns["acme.right"] == columns["acme.groups"]
    without = plan(order=("reference",))
    (unfused, *_) = without.columns(without.registry.patterns[GROUP_FP8])
    assert dict(unfused.form.scalars)["scale_format"] == "float32"


def test_a_place_is_as_an_eager_call_describes_it(monkeypatch, one_rank):
    """What a strategy is asked about is what it is asked about when a model runs."""
    seen = []

    def refuse(self, answers, pattern):
        seen.append(answers.site)
        return (Reason("test", "this is a test"),)

    own = Plan(registry(), torch.bfloat16, CPU, one_rank, 1)
    pattern = own.registry.patterns["all_reduce_add_rms_norm_static_fp8"]
    column = own.columns(pattern)[0]
    site = own.site(pattern, column.form, 64, 4)
    given = tensors(site, 0, CPU)
    monkeypatch.setattr(Strategy, "unmet", refuse)
    scalars = dict(column.form.scalars)
    with pytest.raises(Exception, match="this is a test"):
        ops.all_reduce_add_rms_norm_static_fp8(**given, **scalars, group=one_rank)
    (asked, *_) = [each for each in seen if each.pattern == pattern.name]
    for name in ("pattern", "inputs", "outputs", "attributes", "device", "world_size", "group"):
        assert getattr(site, name) == getattr(asked, name), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_those_of_the_place(dtype):
    own = plan(dtype)
    pattern = own.registry.patterns["all_reduce_add_rms_norm_static_fp8"]
    site = own.site(pattern, own.columns(pattern)[0].form, 64, 4)
    mine, other = tensors(site, 0, CPU), tensors(site, 1, CPU)
    assert mine.keys() == site.inputs.keys()
    for name, tensor in mine.items():
        meta = site.inputs[name]
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (meta.shape, meta.dtype, meta.stride)
        assert tensor.equal(other[name]) is (name != "x")
    assert mine["x"].dtype is mine["weight"].dtype is dtype
    assert mine["scale"].dtype is torch.float32


def test_paths_of_one_form_share_what_follows_the_all_reduce():
    own = plan()
    pattern = own.registry.patterns[ADD]
    columns = own.columns(pattern)
    sites = [own.site(pattern, columns[0].form, hidden, tokens) for hidden, tokens in ((64, 1), (128, 8))]
    rests = {id(own.path(column, pattern, site).rest) for column in columns for site in sites}
    assert len(rests) == 1


def test_a_bare_strategy_is_asked_about_a_bare_place():
    own = plan(torch.int8)
    pattern = own.registry.patterns[ADD]
    (column,) = [c for c in own.columns(pattern) if c.name == "reference.all_reduce_in_rank_order"]
    bf16 = plan().site(pattern, column.form, 64, 4)
    assert own.refusals(column, pattern, bf16) == ()
    from dataclasses import replace

    x = replace(bf16.inputs["x"], dtype=torch.int8)
    (reason,) = own.refusals(column, pattern, replace(bf16, inputs={**bf16.inputs, "x": x}))
    assert reason.code == "dtype"
