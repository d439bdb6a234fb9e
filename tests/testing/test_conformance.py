"""The two lines of a backend's author, as pytest sees them; and a backend whose device is not here."""

import os
import subprocess
import sys

import hypothesis
import pytest

from fusion_core.testing import CHECKS, CheckSkipped, checking, conformance, subjects
from fusion_core.testing.jobs import Outcome

TWO_LINES = "from fusion_core.testing.conformance import *  # noqa: F403\n"
ELSEWHERE = 'BACKEND = "wrong"\nENTRY_POINT = "tests.testing.elsewhere:runs_elsewhere"\n'


def outcome(tmp_path, text, **environment):
    """The status and output of pytest over a test file of this text."""
    (tmp_path / "test_mine.py").write_text(TWO_LINES + text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("FUSION_CORE_")} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    return done.returncode, done.stdout + done.stderr


def test_a_backend_that_does_not_load_is_one_failing_test_with_the_reason(tmp_path):
    status, text = outcome(tmp_path, 'BACKEND = "wrong"\nENTRY_POINT = "there.is.no:such"\n')
    assert status == 1
    assert "order names backend 'wrong', which does not load: ModuleNotFoundError: No module named 'there'" in text
    assert f"1 failed, {len(CHECKS)} skipped" in text


def test_a_file_without_a_backend_is_told_what_it_needs(tmp_path):
    status, text = outcome(tmp_path, "")
    assert status == 1
    assert 'test_mine has no BACKEND, needs BACKEND = "<name of your entry point>"' in text


@pytest.mark.parametrize("strict", ["", "1"])
def test_a_backend_without_its_device_has_all_else_tested_and_the_rest_skipped_with_its_reason(tmp_path, strict):
    status, text = outcome(tmp_path, ELSEWHERE, FUSION_CORE_STRICT=strict)
    need = sum(check.needs_device for check in CHECKS)
    assert "wrong.all_reduce_add_rms_norm cannot run here; on cpu: device is cpu, needs an Acme 1" in text
    if strict:
        assert status == 1
        assert f"{need} failed, {len(CHECKS) - need + 1} passed" in text
        assert "FUSION_CORE_STRICT is set: what cannot run here fails" in text
    else:
        assert status == 0
        assert f"{len(CHECKS) - need + 1} passed, {need} skipped" in text


def test_what_needs_no_device_finds_faults_without_one():
    (subject,) = subjects("wrong", "tests.testing.elsewhere:runs_elsewhere", 20)
    for check in CHECKS:
        if check.needs_device:
            with pytest.raises(CheckSkipped, match="needs an Acme 1"):
                check.run(subject)
        else:
            check.run(subject)


def test_every_check_is_a_test_of_the_kit():
    tests = {name.removeprefix("test_") for name in conformance.__all__ if name.startswith("test_")}
    assert tests == {check.name for check in CHECKS} | {"loads"}
    for check in CHECKS:
        assert check.title
        assert getattr(conformance, f"test_{check.name}").__doc__.startswith(check.title)


DEFINITIONS = [each for each in subjects("reference") if each.strategy.impl is each.pattern.function]


@pytest.mark.parametrize("subject", DEFINITIONS, ids=str)
def test_the_reference_is_compared_at_twice_as_many_sites_as_the_profile_has_examples(subject, monkeypatch):
    compared = []

    def count(site, job, *args):
        compared.append(site)
        return [Outcome()] * site.world_size

    monkeypatch.setattr(checking.pools, "run", count)
    (check,) = [check for check in CHECKS if check.name == "equals_the_oracle_where_it_accepts"]
    check.run(subject)
    assert len(compared) >= 2 * hypothesis.settings().max_examples
    sizes = {site.world_size for site in compared}
    assert sizes <= {1, 2, 3}
    assert len(sizes) >= 2, "few draws may leave one out"
