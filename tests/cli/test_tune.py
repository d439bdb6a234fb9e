import contextlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fusion_core import ConfigError, FusionConfig
from fusion_core.cli.commands import tune
from fusion_core.errors import BackendError
from fusion_core.site import Device
from fusion_core.tables.store import find, read
from fusion_core.tune.sweep import Note
from fusion_core.tune.tuner import Tuned

RECORDED = read(Path(__file__).parent.parent / "tuning" / "h200x4.json")
ADD = "all_reduce_add_rms_norm"
NOTES = (
    *(Note(pattern, 64, tokens, "acme.sum", "x is int8, needs bfloat16") for pattern in "ab" for tokens in (1, 2)),
    *(Note("a", hidden, tokens, "unfused", "the time is over") for hidden in (64, 32) for tokens in (1, 2, 4, 8)),
)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """As if this were rank 0 of two, and measuring took no time."""
    seen = {"tuned": Tuned(RECORDED, NOTES)}

    def measure(registry, asked, *rest):
        seen["asked"] = (None if asked is None else [pattern.name for pattern in asked], *rest)
        print("a library speaks")  # noqa: T201
        return seen["tuned"]

    monkeypatch.setattr(tune, "_measure", measure)
    monkeypatch.setattr(tune, "process_group", lambda: contextlib.nullcontext(seen.get("rank", 0)))
    monkeypatch.setattr(tune, "check_same", lambda **facts: seen.update(facts=facts))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return seen


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8", (8,)),
        ("1..16384", tuple(2**power for power in range(15))),
        ("3..20, 1,12", (1, 3, 6, 12)),
        ("5..5", (5,)),
    ],
)
def test_numbers(text, found):
    assert tune.numbers("tokens", text) == found


@pytest.mark.parametrize("text", ["", "0", "8..4", "1,", "-1", "x", "1..", "0..4", "99999999999", "2147483648", "1e3"])
def test_no_numbers(text):
    with pytest.raises(ConfigError, match=r"^--tokens is .*, needs whole numbers from 1"):
        tune.numbers("tokens", text)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "this is one process, in which there is nothing to reduce, needs 2 or more; torchrun --nproc-per-node 2"),
        (("--tokens", "8..4"), "--tokens is '8..4', needs"),
        (("--hidden", "x"), "--hidden is 'x', needs"),
        (("--patterns", "all_reduce,nope"), "--patterns names 'nope', needs 'all' or names among all_reduce"),
        (("--plot", "figures.png"), ".svg"),
        (("--output", "."), "--output is '.', a folder, needs a file"),
        (("--output", "no/such/folder/table.json"), "needs a file in a folder that exists"),
        (("--order", "nope"), "'nope', which is not installed"),
        (("--dtype", "int8"), "int8"),
        (("--budget", "0"), "--budget"),
    ],
)
def test_a_wrong_call_measures_nothing(run, monkeypatch, args, says):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = run("tune", *args, status=2)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_more_processes_than_gpus(run, monkeypatch, measured):
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.torch.cuda, "device_count", lambda: 1)
    assert "there are 2 processes for 1 GPUs, needs a GPU for each" in run("tune", status=2).stderr


def test_what_is_measured(run, measured):
    run("tune")
    assert measured["asked"] == (None, (2048, 4096, 8192), tuple(2**n for n in range(15)), "bfloat16", 600.0, 0, None)
    run("tune", "--patterns", f"{ADD}, all_reduce,{ADD}", "--hidden", "64", "--tokens", "8", "--budget", "9", "--dtype", "float16")  # fmt: skip
    assert measured["asked"] == ([ADD, "all_reduce"], (64,), (8,), "float16", 9.0, 0, None)
    run("tune", "--patterns", "all")
    assert len(measured["asked"][0]) >= 13


def test_text(run, measured, tmp_path):
    text = run("tune").stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("the fastest path on 4 × NVIDIA H200, microseconds a place")
    first = next(line for line in lines if line.startswith(ADD))
    assert first.startswith(f"{ADD} 8192 1")
    assert f"{ADD}, hidden 8192: times as fast as unfused, by tokens" in lines
    assert any(line.endswith("us reference.symm_mem_two_shot") for line in lines)
    assert "no figure of acme.sum for a, b at hidden 64, tokens 1, 2: x is int8, needs bfloat16" in lines
    assert "no figures for a at hidden 64, 32, tokens 1 to 8 (4 of them): the time is over" in lines
    path = tmp_path / "fusion_core" / "tables" / "nvidia-h200-x4.json"
    assert lines[-1].endswith(f"written to {path}")
    assert read(path) == RECORDED


def test_json(run, measured, tmp_path):
    answer = json.loads(run("tune", "--json", "--output", str(tmp_path / "mine.json")).stdout)
    assert answer.keys() == {"path", "seconds", "table", "crossovers", "notes"}
    assert answer["table"] == RECORDED.to_dict()
    assert answer["crossovers"][0].keys() == {"base_line", "pattern", "dtype", "hidden", "first", "last", "path", "us", "unfused_us", "gains"}  # fmt: skip
    assert answer["notes"][0] == {"pattern": "a", "hidden": 64, "tokens": 1, "path": "acme.sum", "why": "x is int8, needs bfloat16"}  # fmt: skip
    assert answer["path"] == str(tmp_path / "mine.json")
    assert read(tmp_path / "mine.json") == RECORDED
    assert not (tmp_path / "fusion_core").exists()


def test_each_base_line_has_a_comparison_of_its_own(run, measured):
    rows = tuple(replace(row, us={**row.us, "unfused vllm::all_reduce": 0.5}) for row in RECORDED.rows)
    measured["tuned"] = Tuned(replace(RECORDED, rows=rows), ())
    shown = run("tune", "--collective", "vllm").stdout
    first, _, second = shown.partition("compared with unfused vllm::all_reduce")
    assert "flashinfer" in first
    assert second.count("unfused vllm::all_reduce") == len({(row.pattern, row.hidden) for row in rows})
    assert measured["asked"][-1] == measured["facts"]["collective"] == "vllm"
    answer = json.loads(run("tune", "--collective", "vllm", "--json").stdout)
    assert {each["base_line"] for each in answer["crossovers"]} == {"unfused", "unfused vllm::all_reduce"}


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_disk_that_is_full_when_it_is_done(run, measured, monkeypatch, tmp_path, options):
    """The old table stays whole, and what took ten minutes is printed all the same."""
    path = tmp_path / "mine.json"
    path.write_text("the old table")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def measure(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
        return measured["tuned"]

    monkeypatch.setattr(tune, "_measure", measure)
    try:
        result = run("tune", "--output", str(path), *options, status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.stderr.splitlines()[-1].startswith(f"fusion-core: --output {path} cannot be written: [Errno 27]")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "the old table"
    if options:
        answer = json.loads(result.stdout)
        assert answer["path"] is None
        assert answer["table"] == RECORDED.to_dict()
    else:
        assert "the fastest path on 4 × NVIDIA H200" in result.stdout
        assert "written to" not in result.stdout
        assert "nothing was measured" not in result.stdout


def test_ranks_are_to_have_the_same_choices_and_sizes(run, measured):
    run("tune", "--order", "reference", "--hidden", "64")
    assert measured["facts"]["order"] == ("reference",)
    assert measured["facts"]["backends"].startswith("reference (fusion-core")
    assert measured["facts"]["hidden"] == "64"


def test_plot(run, measured, tmp_path):
    pytest.importorskip("matplotlib")
    run("tune", "--plot", str(tmp_path / "figures.svg"))
    assert "<svg" in (tmp_path / "figures.svg").read_text()


def test_another_rank_says_and_writes_nothing(run, measured, tmp_path):
    measured["rank"] = 1
    result = run("tune")
    assert result.stdout == ""
    assert [*tmp_path.iterdir()] == []


def test_where_nothing_was_measured_the_answer_is_no(run, measured, tmp_path):
    measured["tuned"] = Tuned(None, NOTES)
    result = run("tune", status=1)
    assert "nothing was measured: no table was written" in result.stdout
    assert "the time is over" in result.stdout
    answer = json.loads(run("tune", "--json", status=1).stdout)
    assert answer["table"] is answer["path"] is None
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (BackendError("rank 1 has gpu 'B', needs 'A'"), 2)]
)
def test_what_breaks_off_writes_nothing_and_the_watchdog_is_called_off(
    run, measured, monkeypatch, tmp_path, error, status
):
    called = []

    def fail(*args):
        raise error

    monkeypatch.setattr(tune, "_measure", fail)
    monkeypatch.setattr(tune.faulthandler, "dump_traceback_later", lambda seconds, **_: called.append(seconds))
    monkeypatch.setattr(tune.faulthandler, "cancel_dump_traceback_later", lambda: called.append("off"))
    run("tune", "--budget", "7", status=status)
    assert called == [307.0, "off"]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "status"),
    [(("--patterns", ADD), 0), pytest.param(("--patterns", ADD, "--order", "none"), 1, marks=pytest.mark.nightly)],
)
def test_the_whole_way(tmp_path, monkeypatch, options, status):
    """Two real processes; the table is found by the next process that looks for one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fusion_core"]  # fmt: skip
    command += ["tune", "--hidden", "64", "--tokens", "1,8", "--json", *options]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert (done.returncode == 0) is (status == 0), done.stderr
    answer = json.loads(done.stdout)
    if status:
        assert answer["path"] is answer["table"] is None
        assert [*tmp_path.iterdir()] == []
        return
    points = [(row["pattern"], row["dtype"], row["hidden"], row["tokens"]) for row in answer["table"]["rows"]]
    assert points == [(ADD, "bfloat16", 64, 1), (ADD, "bfloat16", 64, 8)]
    for row in answer["table"]["rows"]:
        assert row["us"].keys() == {"unfused", "reference.all_reduce_in_rank_order"}
        assert all(1.0 < time < 1e6 for time in row["us"].values())
    assert "-m fusion_core tune --hidden 64 --tokens 1,8" in answer["table"]["command"]
    assert {note["path"] for note in answer["notes"]} == {"reference.symm_mem_one_shot", "reference.symm_mem_two_shot"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = find(Device("cpu"), 2, FusionConfig().table)
    assert found.origin == answer["path"]
    assert found.table is not None
    assert found.table.to_dict() == answer["table"]
