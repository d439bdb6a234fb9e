"""What the strategies require, what each of it guards, and that no mutation of it survives the kit."""

import inspect
from dataclasses import replace

import pytest
import torch

from fusion_core import Device, KnownFaster, Site, TensorMeta
from fusion_core.patterns.plain import all_reduce, all_reduce_add_rms_norm
from fusion_core.testing import CheckFailed, example_site, sides, subjects
from fusion_reference import requirements, strategies
from fusion_reference.requirements import MostBytes, OnlyForItsBits, SymmetricMemory, TorchCollective
from tests.testing.test_requirement_mutations import caught, changed, mutants

EXPANDED = [each for strategy in strategies.strategies() for each in strategy.expanded()]
STRATEGIES = {each.name.partition(".")[2]: each for each in EXPANDED}
KERNELS = ("symm_mem_one_shot", "symm_mem_two_shot")
MOST = 512 << 20
H200 = Device("cuda", "sm_90")


def site(shape=(4, 8192), dtype=torch.bfloat16, ranks=4, device=H200):
    x = TensorMeta(shape, dtype)
    return Site("all_reduce", "here", {"x": x}, {"reduced": x}, {}, device, ranks, "tp")


def reasons(name, *args, **kwargs):
    return [reason.code for reason in STRATEGIES[name].cannot(site(*args, **kwargs), all_reduce)]


@pytest.mark.parametrize("name", KERNELS)
def test_what_the_kernels_take(name):
    for ok in ({}, {"dtype": torch.float32}, {"ranks": 2}, {"ranks": 8}, {"shape": (0, 64)}, {"shape": (3, 2, 8)},
               {"shape": (32768, 8192)}, {"device": Device("cuda", "sm_80")}, {"device": Device("cuda", "gfx942")}):  # fmt: skip
        assert reasons(name, **ok) == [], ok


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"dtype": torch.float16}, "dtype"),  # the kernels are compiled for two dtypes
        ({"dtype": torch.float64}, "dtype"),
        ({"shape": (4, 8196)}, "multiple_of"),
        ({"shape": (32769, 8192)}, "size"),
        ({"ranks": 1}, "world_size"),
        ({"ranks": 9}, "world_size"),
        ({"device": Device("cpu")}, "arch"),
        ({"device": Device("cuda", "sm_75")}, "arch"),
        ({"device": Device("cuda", "gfx90a")}, "arch"),
    ],
)
def test_what_they_do_not_take(name, wrong, code):
    assert reasons(name, **wrong) == [code]


def test_two_shot_is_compiled_for_three_numbers_of_ranks():
    for ranks in (3, 5, 6, 7):
        assert reasons("symm_mem_one_shot", ranks=ranks) == []
        assert reasons("symm_mem_two_shot", ranks=ranks) == ["world_size"]


@pytest.mark.parametrize("name", KERNELS)
def test_without_a_table_nobody_has_measured_them(name):
    (reason,) = STRATEGIES[name].should_not(site())
    assert reason.code == "measured"
    assert "nobody has measured" in reason.found
    assert "fusion-core tune" in reason.hint


def test_the_one_in_rank_order_is_for_its_bits_alone():
    strategy = STRATEGIES["all_reduce_in_rank_order"]
    assert strategy.batch_invariant
    assert not any(each.batch_invariant for name, each in STRATEGIES.items() if name in KERNELS)
    (reason,) = strategy.should_not(site())
    assert 'numerics="deterministic"' in str(reason)
    for device, ranks in ((Device("cpu"), 1), (Device("cuda", "gfx90a"), 16), (Device("xpu"), 3)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            assert reasons("all_reduce_in_rank_order", (5, 7), dtype, ranks, device) == []
    assert reasons("all_reduce_in_rank_order", dtype=torch.int32) == ["dtype"]


def test_a_size_that_is_known_only_at_run_time_is_the_operator_s_to_look_at():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    unknown = ShapeEnv().create_unbacked_symint()
    for name in KERNELS:
        assert reasons(name, (unknown, 8192)) == []


@pytest.mark.parametrize(
    ("torch_has", "lacking"),
    [
        ({}, None),
        ({"available": False}, "torch.distributed"),
        ({"operators": ("one_shot_all_reduce_out", "two_shot_all_reduce_")}, "torch.ops.symm_mem.two_shot_all_reduce_out"),
        ({"cuda": "12.1"}, "CUDA 12.3 (it is built for 12.1)"),
        ({"cuda": "12.10"}, None),
        ({"cuda": "13.0"}, None),
    ],
)  # fmt: skip
def test_the_torch_at_hand(torch_has, lacking, monkeypatch):
    if "available" in torch_has:
        monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    if "operators" in torch_has:
        monkeypatch.setattr(
            requirements.torch.ops, "symm_mem", type("Operators", (), dict.fromkeys(torch_has["operators"]))
        )
    monkeypatch.setattr(torch.version, "cuda", torch_has.get("cuda"))
    found = SymmetricMemory.here()
    assert found.lacking == lacking
    assert (found.unmet(site()) is None) == (lacking is None)
    if lacking:
        assert f"is without {lacking}" in str(found.unmet(site()))


REQUIREMENTS = [MostBytes("x", MOST), MostBytes("x", 1 << 16)]
OF_THE_MACHINE = [SymmetricMemory(None), SymmetricMemory("torch.distributed"), OnlyForItsBits()]


@pytest.fixture
def _sides_are_known():
    subjects("reference")


def test_every_requirement_of_the_backend_is_among_them():
    own = [c for c in vars(requirements).values() if inspect.isclass(c) and c.__module__ == requirements.__name__]
    assert set(own) == {type(each) for each in (*REQUIREMENTS, *OF_THE_MACHINE, TorchCollective())}


@pytest.mark.usefixtures("_sides_are_known")
@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_both_sides_are_as_said(requirement, monkeypatch):
    caught(monkeypatch, requirement)
    both = sides(requirement, example_site(all_reduce_add_rms_norm))
    assert both.met
    assert both.unmet


@pytest.mark.usefixtures("_sides_are_known")
@pytest.mark.parametrize("requirement", OF_THE_MACHINE, ids=repr)
def test_what_hangs_on_no_site_has_one_side(requirement):
    both = sides(requirement, example_site(all_reduce_add_rms_norm))
    place = example_site(all_reduce_add_rms_norm)
    assert (both.met, both.unmet) == (((place,), ()) if requirement.unmet(place) is None else ((), (place,)))


@pytest.mark.usefixtures("_sides_are_known")
@pytest.mark.parametrize(
    ("change", "unmet"), list(mutants(MostBytes)), ids=[change for change, _ in mutants(MostBytes)]
)
def test_a_requirement_with_one_operator_or_number_changed_is_caught(change, unmet, monkeypatch):
    for requirement in REQUIREMENTS:
        try:
            caught(monkeypatch, changed(requirement, unmet))
        except CheckFailed:
            return
    pytest.fail(f"MostBytes.unmet with {change} passes the kit")


def test_the_place_may_call_another_s_collective():
    other = replace(site(), attributes={"collective": "vllm"})
    assert [reason.code for reason in STRATEGIES["all_reduce"].should_not(other)] == ["collective"]
    assert STRATEGIES["all_reduce"].should_not(site()) == ()


def test_known_faster_names_no_machine():
    for name in KERNELS:
        assert STRATEGIES[name].worthwhile == (KnownFaster("x"),)
