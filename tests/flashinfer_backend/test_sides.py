"""The kit knows FlashInfer's own requirements, and no mutation of them survives it."""

import inspect
import subprocess
import sys

import pytest

from fusion_core import BackendError
from fusion_core.patterns.plain import all_reduce_add_rms_norm
from fusion_core.site.run_time import has_run_time_sizes
from fusion_core.testing import CHECKS, CheckFailed, checks_of_sizes, example_site, sides, subject, subjects
from fusion_flashinfer import requirements
from fusion_flashinfer.requirements import (
    Capability,
    KernelPresent,
    MoreRowsThanRanks,
    MulticastAllowed,
    OneCluster,
    OneLaunch,
    VectorForEachRank,
)
from tests.support.graphs import plugin
from tests.testing.test_requirement_mutations import caught, changed, mutants

REQUIREMENTS = [
    Capability(10),
    OneCluster("x"),
    OneCluster("x", 512),
    OneLaunch("x"),
    MoreRowsThanRanks("x"),
    VectorForEachRank("x"),
]
OF_THE_MACHINE = [
    KernelPresent("kAllReduce", 0, 0),
    KernelPresent("kAllReduce", 0, 1),
    KernelPresent("kAllReduce", 0, None),
    MulticastAllowed(None),
    MulticastAllowed("NCCL_NVLS_ENABLE=0"),
]
KINDS = [type(each) for each in REQUIREMENTS]


@pytest.fixture(autouse=True)
def _sides_are_known():
    subjects("flashinfer")


def test_every_requirement_of_the_backend_is_among_them():
    own = [c for c in vars(requirements).values() if inspect.isclass(c) and c.__module__ == requirements.__name__]
    assert set(own) == {type(each) for each in (*REQUIREMENTS, *OF_THE_MACHINE)}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_both_sides_are_as_said(requirement, monkeypatch):
    caught(monkeypatch, requirement)
    both = sides(requirement, example_site(all_reduce_add_rms_norm))
    assert both.met
    assert both.unmet


@pytest.mark.parametrize("requirement", OF_THE_MACHINE, ids=repr)
def test_what_hangs_on_the_machine_has_one_side(requirement):
    site = example_site(all_reduce_add_rms_norm)
    both = sides(requirement, site)
    reason = requirement.unmet(site)
    assert (both.met, both.unmet) == (((site,), ()) if reason is None else ((), (site,)))


MUTANTS = [(kind, change, unmet) for kind in dict.fromkeys(KINDS) for change, unmet in mutants(kind)]


@pytest.mark.parametrize(("kind", "change", "unmet"), MUTANTS, ids=[f"{k.__name__}: {c}" for k, c, _ in MUTANTS])
def test_a_requirement_with_one_operator_or_number_changed_is_caught(kind, change, unmet, monkeypatch):
    for requirement in [each for each in REQUIREMENTS if type(each) is kind]:
        try:
            caught(monkeypatch, changed(requirement, unmet))
        except CheckFailed:
            return
    pytest.fail(f"{kind.__name__}.unmet with {change} passes the kit")


@pytest.mark.parametrize("options", ["", "flashinfer.pdl,flashinfer.mnnvl"])
def test_every_strategy_passes_what_needs_no_device(options, monkeypatch):
    monkeypatch.setenv("FUSION_CORE_OPTIONS", options)
    found = subjects("flashinfer")
    assert len(found) == (91 if options else 38)
    for each in found:
        for check in CHECKS:
            if not check.needs_device and check.name != "declares_what_the_definition_gives":
                check.run(each)


def test_the_backend_itself_brings_no_test_library():
    program = (
        "import fusion_core, sys; fusion_core.Registry.load(); "
        "sys.exit(any(n.startswith(('fusion_core.testing', 'hypothesis', 'pytest')) for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0


def test_a_testing_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    package = tmp_path / "fusion_broken_sides"
    package.mkdir()
    hook = "import fusion_core\n\n\n@fusion_core.hookimpl\ndef fusion_strategies():\n    return []\n"
    (package / "__init__.py").write_text(hook)
    (package / "testing.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BackendError, match=r"importing fusion_broken_sides\.testing of backend 'broken' raised .*nowher"
    ):
        subject.load("broken", "fusion_broken_sides")


def test_a_plugin_without_one_is_as_before(monkeypatch):
    point = plugin(monkeypatch, "plain", fusion_strategies=lambda: ())
    assert "plain" in subject.load("plain", point.value).backends


@pytest.mark.parametrize("subject", subjects("flashinfer"), ids=str)
def test_the_kit_runs_a_strategy_at_the_bounds_of_its_requirements(subject):
    plain = example_site(subject.pattern, subject.strategy)
    sites = list(checks_of_sizes._at_bounds(subject, plain))
    assert sites, "every strategy of FlashInfer has a bound on sizes"
    assert not any(has_run_time_sizes(site) for site in sites)
