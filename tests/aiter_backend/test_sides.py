"""The kit knows AITER's own requirements, and no mutation of them survives it."""

import inspect

import pytest

from fusion_aiter import requirements
from fusion_aiter.kernels import KERNELS
from fusion_aiter.requirements import GroupSize, LeastScale, NativeFP8, RowFits
from fusion_core import Reason
from fusion_core.patterns.plain import all_reduce_add_rms_norm
from fusion_core.testing import CHECKS, CheckFailed, example_site, sides, subjects
from tests.testing.test_requirement_mutations import caught, changed, mutants

NORM, TOKEN, GROUP, MXFP4_OUT = (
    next(kernel for kernel in KERNELS if kernel.name == f"all_reduce_add_rms_norm{name}")
    for name in ("", "_token_fp8", "_group_fp8", "_mxfp4_out")
)
REQUIREMENTS = [
    RowFits("x", NORM, one_stage=False),
    RowFits("x", NORM, one_stage=True),
    RowFits("x", TOKEN, one_stage=False),
    RowFits("x", GROUP, one_stage=True),
    RowFits("x", MXFP4_OUT, one_stage=False),
    GroupSize("x"),
    NativeFP8(),
    LeastScale(1 / (512 * 240)),
]


@pytest.fixture(autouse=True)
def _sides_are_known():
    subjects("aiter")


def test_every_requirement_of_the_backend_is_among_them():
    own = [c for c in vars(requirements).values() if inspect.isclass(c) and c.__module__ == requirements.__name__]
    assert set(own) == {type(each) for each in REQUIREMENTS}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=repr)
def test_both_sides_are_as_said(requirement, monkeypatch):
    caught(monkeypatch, requirement)
    both = sides(requirement, example_site(all_reduce_add_rms_norm))
    assert both.met
    assert both.unmet


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=repr)
def test_a_requirement_that_is_always_met_is_caught(requirement, monkeypatch):
    with pytest.raises(CheckFailed, match="is not met here and does not refuse"):
        caught(monkeypatch, changed(requirement, lambda self, site: None))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=repr)
def test_a_requirement_that_is_never_met_is_caught(requirement, monkeypatch):
    with pytest.raises(CheckFailed, match="is met here and refuses: never"):
        caught(monkeypatch, changed(requirement, lambda self, site: Reason("never", "never")))


KINDS = dict.fromkeys(type(each) for each in REQUIREMENTS)
MUTANTS = [(kind, change, unmet) for kind in KINDS for change, unmet in mutants(kind)]


@pytest.mark.parametrize(("kind", "change", "unmet"), MUTANTS, ids=[f"{k.__name__}: {c}" for k, c, _ in MUTANTS])
def test_a_requirement_with_one_operator_or_number_changed_is_caught(kind, change, unmet, monkeypatch):
    for requirement in [each for each in REQUIREMENTS if type(each) is kind]:
        try:
            caught(monkeypatch, changed(requirement, unmet))
        except CheckFailed:
            return
    pytest.fail(f"{kind.__name__}.unmet with {change} passes the kit")


@pytest.mark.parametrize(("options", "count"), [("", 15), ("aiter.one_stage", 29)])
def test_every_strategy_passes_what_needs_no_device(options, count, monkeypatch):
    monkeypatch.setenv("FUSION_CORE_OPTIONS", options)
    found = subjects("aiter")
    assert len(found) == count
    for each in found:
        for check in CHECKS:
            if not check.needs_device and check.name != "declares_what_the_definition_gives":
                check.run(each)
