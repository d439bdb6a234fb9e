import subprocess
import sys

import pytest

COMMANDS = ["backends", "demo", "explain", "patterns", "tune"]


def test_every_command_is_listed(run):
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run, command):
    result = run(command, "--help")
    assert "--json" in result.stdout
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nope"], "No such command 'nope'"),
        (["backend"], "backends"),
        (["backends", "--nope"], "--nope"),
        (["--nope"], "--nope"),
        (["explain"], "MODULE:FUNCTION"),
        (["demo", "--layers", "x"], "--layers"),
        (["demo", "--layers", "0"], "--layers"),
    ],
)
def test_a_wrong_call_is_one_sentence(run, args, says):
    result = run(*args, status=2)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_no_command_shows_the_help(run):
    assert "Commands" in run(status=2).output


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("FUSION_CORE_STRICT", "maybe", "'maybe', needs one of 1, true, yes, on, 0, false, no, off"),
        ("FUSION_CORE_ORDRE", "reference", "FUSION_CORE_ORDRE, needs names among FUSION_CORE_"),
        ("FUSION_CORE_ORDER", "nope", "'nope', which is not installed"),
    ],
)
@pytest.mark.parametrize("command", [["backends"], ["patterns"], ["explain", "json:dumps"], ["demo"]])
def test_a_variable_that_cannot_be_used(run, monkeypatch, command, variable, value, says):
    monkeypatch.setenv(variable, value)
    assert says in run(*command, status=2).stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['fusion-core', 'backends']; import fusion_core.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"{missing} is not installed, needs the cli extra; pip install 'fusion-core[cli]'\n"
    assert done.stdout == ""
