import json
import shlex

import pytest

from fusion_core.plugins import registry
from fusion_core.testing import CHECKS, CheckFailed, checking, pools, subjects

FEW = ("--check", "accepts_its_own_example", "--check", "declares_what_the_definition_gives")


@pytest.fixture(autouse=True)
def _hypothesis_profile():
    import hypothesis

    before = hypothesis.settings.get_current_profile_name()
    yield
    hypothesis.settings.load_profile(before)


def backend(monkeypatch, name):
    """As if the backend called ``name`` in the kit's own tests were installed."""
    from importlib.metadata import EntryPoint

    points = [EntryPoint("wrong", f"tests.testing.wrong_backends:{name}", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def test_a_right_backend_passes_and_every_check_has_a_line(run):
    text = run("verify", "reference", "--examples", "2", *FEW).stdout
    assert "accepts its own example" in text
    lines = [line for line in text.splitlines() if line.startswith("reference.")]
    assert len(lines) == 23
    assert all(line.split()[2:] == ["ok", "ok"] for line in lines)
    assert "46 of 46 checks passed, 0 failed" in text


def test_json(run):
    answer = json.loads(run("verify", "reference", "--examples", "1", "--json", *FEW).stdout)
    assert answer.keys() == {"backend", "examples", "strict", "failed", "machine", "usable", "strategies"}
    assert answer["failed"] == 0
    assert answer["strategies"][0].keys() == {"strategy", "pattern", "checks"}
    assert answer["strategies"][0]["checks"]["accepts_its_own_example"] == {"outcome": "passed", "why": ""}


def test_a_backend_that_refuses_everything_fails_with_its_reason(run, monkeypatch):
    backend(monkeypatch, "refuses_everything")
    result = run("verify", "wrong", "--check", "accepts_its_own_example", status=1)
    assert "FAILED" in result.stdout
    assert "accepts_its_own_example (wrong." in result.stdout
    assert "1 failed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("verify", "nobody"), "order names backend 'nobody', which is not installed"),
        (
            ("verify", "reference", "--check", "is_nice"),
            "--check is is_nice, needs names among accepts_its_own_example",
        ),
        (("verify", "reference", "--examples", "0"), "--examples"),
        (("verify",), "Missing argument"),
    ],
)
def test_a_wrong_call_is_one_sentence(run, arguments, why):
    result = run(*arguments, status=2)
    assert why in result.stderr
    assert result.stdout == ""


def test_the_pools_are_stopped(run, monkeypatch):
    stopped = []
    monkeypatch.setattr(pools, "close", lambda: stopped.append(True))
    run("verify", "reference", "--examples", "1", "--check", "accepts_its_own_example")
    assert stopped == [True]


def test_a_backend_without_strategies(run, monkeypatch):
    import sys
    import types
    from importlib.metadata import EntryPoint

    module = types.ModuleType("empty_plugin")
    exec("import fusion_core\n@fusion_core.hookimpl\ndef fusion_available(): return []", vars(module))
    monkeypatch.setitem(sys.modules, "empty_plugin", module)
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("empty", "empty_plugin", registry.GROUP)])
    assert "backend 'empty' has no strategies" in run("verify", "empty", status=2).stderr


def test_what_cannot_run_here_is_said_once_for_all_strategies(run):
    text = run("verify", "aiter", "--check", "fake_matches_real", "--check", "takes_no_rows_or_refuses").stdout
    (line,) = [line for line in text.splitlines() if "cannot run here; on cpu" in line]
    assert line.startswith(
        "  fake_matches_real, takes_no_rows_or_refuses (aiter.all_reduce, aiter.all_reduce_rms_norm, "
    )
    assert "and 12 more): cannot run here; on cpu: this torch is not built for ROCm" in line
    assert "0 of 30 checks passed, 0 failed, 30 cannot run here" in text


def test_json_says_what_the_machine_is_and_why_nothing_runs(run, monkeypatch):
    monkeypatch.setenv("AITER_CUSTOM_AR_MAX_SIZE", "0")
    answer = json.loads(run("verify", "aiter", "--json", "--check", "accepts_its_own_example").stdout)
    machine = answer["machine"]
    assert machine.keys() == {"device", "gpus", "system", "python", "cuda", "rocm", "versions", "settings"}
    assert machine["versions"]["torch"]
    assert machine["settings"]["AITER_CUSTOM_AR_MAX_SIZE"] == "0"
    assert [reason["code"] for reason in answer["usable"]["reasons"]] == ["platform", "not_installed"]


def test_a_failure_prints_the_command_that_runs_its_example_alone(run, monkeypatch):
    (check,) = [each for each in CHECKS if each.name == "equals_the_oracle_where_it_accepts"]
    (subject,) = subjects("wrong", "tests.testing.wrong_backends:forgets_weight_bias", 40)
    with pytest.raises(CheckFailed) as caught:
        check.run(subject)
    lines = str(caught.value).splitlines()
    site, command = (next(line for line in lines if line.startswith(start)) for start in ("  at ", "  again: "))
    words = shlex.split(command.removeprefix("  again: "))
    assert words[:2] == ["fusion-core", "verify"]
    found = run(*words[1:], status=1)
    assert " ".join(site.split()) in " ".join(found.stdout.split())
    ran = []
    monkeypatch.setattr(checking, "run", lambda *arguments: ran.append(arguments) or [])
    check.run(subject, words[-1])
    assert len(ran) == 1, "one example, and no generated ones"


def test_what_no_failure_printed_is_refused(run):
    command = ["verify", "reference", "--strategy", "reference.all_reduce", "--check", "takes_no_rows_or_refuses"]
    for words, reason in (
        ([*command, "--example", "eJx"], "--example is 'eJx', needs the text that a failed check prints"),
        (
            [*command[:2], "--example", "eJx"],
            "--example is of one check and strategy, needs --check and --strategy once",
        ),
        ([*command[:2], "--strategy", "reference.none"], "--strategy is reference.none, needs names among reference."),
    ):
        assert reason in " ".join(run(*words, status=2).stderr.split())
