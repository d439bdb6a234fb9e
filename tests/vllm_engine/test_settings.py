"""What `fusion_vllm` does without vLLM: its settings, its releases, its imports. Each of it is a part of `make test`."""

import subprocess
import sys

import pytest

from fusion_core import ConfigError, FusionConfig, Report
from fusion_vllm import versions
from fusion_vllm.equal_graphs import Graphs, count_of
from fusion_vllm.settings import config_of, given_in


def test_fields_are_those_of_a_fusion_config() -> None:
    assert config_of({}) == FusionConfig()
    assert config_of({"order": ["reference"], "max_tokens": 64}) == FusionConfig(order=("reference",), max_tokens=64)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"backend": "flashinfer"}, "has 'backend', needs names among order, strict, numerics, "),
        ({"order": "flashinfer"}, "order is 'flashinfer', needs a tuple of backend names, or None"),
        ("flashinfer", "is 'flashinfer', needs an object with any of the fields order, "),
        (True, r"is True, needs an object with any of the fields order, .*; \{\} for the defaults"),
    ],
)
def test_a_wrong_field_is_an_error_that_names_the_right_ones(given: object, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config_of(given)


def test_only_its_own_key_switches_it_on() -> None:
    class Given:
        additional_config: object = {"other": {}}

    assert given_in(Given()) is None
    Given.additional_config = {"fusion_core": {}}
    assert given_in(Given()) == {}
    Given.additional_config = object()  # vLLM takes one with a method compute_hash too
    assert given_in(Given()) is None


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc2+cpu"])
def test_a_release_whose_hooks_are_known(version: str) -> None:
    assert versions.is_known(version)


@pytest.mark.parametrize("version", ["0.31.4", "0.320.0", "1.0", "dev"])
def test_another_release_is_said_and_left_alone(version: str) -> None:
    assert not versions.is_known(version)
    with pytest.warns(RuntimeWarning, match=f"vLLM is {version}, needs 0.32: nothing is fused"):
        versions.warn(version)


def test_equal_graphs_are_counted_and_others_are_not() -> None:
    graphs, first, second = Graphs(), *(Report(sites=(), device=name) for name in ("cpu", "cuda"))
    one, other, unfused = object(), object(), object()
    assert graphs.returned(one, first) is None
    assert graphs.returned(other, second) is None
    assert graphs.returned(one, None) is first
    assert graphs.returned(one, None) is first
    assert graphs.returned(unfused, None) is None
    assert (count_of(first), count_of(second)) == (3, 1)


def test_its_import_does_not_import_vllm() -> None:
    code = "import sys, fusion_vllm; sys.exit('vllm' in sys.modules or 'torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_the_pass_needs_vllm() -> None:
    code = "import fusion_vllm; fusion_vllm.fusion_pass"
    done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False, capture_output=True, text=True)
    assert "fusion_vllm.fusion_pass needs vLLM: import vllm before fusion_vllm" in done.stderr
