import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from fusion_core.bench.shapes import SHAPES

ROOT = Path(__file__).parents[2]


def torchrun(*arguments, status=0):
    """Run the command on two ranks as a user does; what it printed."""
    ranks = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fusion_core",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*ranks, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.nightly  # the function below goes the same way; what is printed and drawn is in `tests/benching`
def test_a_shape_as_table_and_plot(tmp_path):
    plot = tmp_path / "gain.svg"
    few = shlex.split("--layers 1 --context 16 --batches 1,4 --rounds 3 --seconds 0.02 --watchdog 400")
    done = torchrun("bench", "--shape", "tiny", *few, "--plot", str(plot))
    lines = done.stdout.splitlines()
    assert lines[0] == "tiny, 1 layer, context 16; 2 ranks, cpu; mode default, a graph for each batch size"
    assert lines[2].split()[:5] == ["batch", "plain", "µs", "fused", "µs"]
    for line, batch in zip(lines[3:5], ("1", "4"), strict=True):
        assert line.split()[0] == batch
        assert "2 of 2       reference.all_reduce_add_rms_norm" in line
    drawn = [line for line in lines if line.endswith("x")]
    assert [line.split()[0] for line in drawn] == ["1", "4"]
    assert all("|" in line and line.isascii() for line in drawn)
    assert lines[-1].startswith("times on a CPU do not predict")
    assert len([line for line in lines if line.startswith("batch")]) == 1  # rank 0 alone speaks
    assert "tiny, 1 layer, context 16, 2 ranks" in plot.read_text()
    assert "Timeout" not in done.stderr


def test_a_function_as_json_where_a_gain_is_too_small():
    few = shlex.split("--batches 2,4 --dynamic --rounds 2 --seconds 0.02 --fail-below 1000 --order reference --json")
    done = torchrun("bench", "examples/bench_step.py:step", *few, status=1)
    answer = json.loads(done.stdout)
    assert answer["subject"] == {"function": "examples/bench_step.py:step"}
    assert answer["command"].startswith("torchrun --nproc-per-node 2 -m fusion_core bench examples/bench_step.py:step ")
    assert answer["ranks"] == 2
    assert answer["machine"]["versions"]["torch"]
    assert answer["config"]["order"] == ["reference"]
    first, second = answer["rows"]
    assert [first["batch"], second["batch"]] == [2, 4]
    assert [first["new_graph"], second["new_graph"]] == [True, False]
    for row in answer["rows"]:
        assert (row["sites"], row["fused_sites"]) == (2, 2)
        assert sum(row["strategies"].values()) == 2
        assert len(row["gain_by_round"]) == len(row["plain_rounds_us"]) == 2
        assert row["difference"] <= row["difference_limit"] == 0.1
        assert row["gain"] == pytest.approx(row["plain_us"] / row["fused_us"], rel=1e-2)
    assert len(first["reports"][0]["sites"]) == 2
    assert [problem.partition(":")[0] for problem in answer["problems"]] == ["batch 2", "batch 4"]
    assert "needs at least 1000" in done.stderr


def test_shapes_are_listed(run):
    lines = run("bench", "--list-shapes").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(SHAPES)
    assert lines[2].split()[:6] == ["llama-3-70b", "8192", "28672", "64", "8", "128"]
    assert json.loads(run("bench", "--list-shapes", "--json").stdout)["qwen3-32b"]["qk_norm"] is True


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "found neither MODULE:FUNCTION nor --shape"),
        ("a.py:f --shape tiny", "found both"),
        ("--shape llama", "'llama', needs one of llama-3-8b"),
        ("--shape tiny --batches 0", "needs different whole numbers"),
        ("--shape tiny --batches 1,x", "needs different whole numbers"),
        ("--shape tiny --layers 0", "--layers"),
        ("--shape tiny --rounds 0", "--rounds"),
        ("--shape tiny --mode fastest", "--mode"),
        ("--shape tiny --plot gain.png", "ends in .svg"),
        ("--shape tiny --plot no/such/folder/gain.svg", "a folder that does not exist"),
        ("--shape tiny --order nope", "'nope', which is not installed"),
        ("gone.py:f", "'gone.py' does not exist"),
        ("--shape tiny", "this is one process, in which there is nothing to reduce, needs 2 or more; torchrun"),
    ],
)
def test_wrong_calls(run, arguments, says):
    result = run("bench", *shlex.split(arguments), status=2)
    assert says in result.stderr
    assert result.stdout == ""
    assert not dist.is_initialized()


def test_half_an_environment_of_torchrun(run, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "RANK alone, needs RANK and WORLD_SIZE" in run("bench", "--shape", "tiny", status=2).stderr


@pytest.mark.usefixtures("one_rank")
class TestInAGroup:
    def test_an_error_of_the_users_own_keeps_its_traceback(self, run, tmp_path):
        (tmp_path / "broken_app.py").write_text("def step(batch):\n    raise RuntimeError('my own mistake')\n")
        result = run("bench", f"{tmp_path}/broken_app.py:step", "--json", status=1)
        assert result.stderr.startswith("Traceback")
        assert "RuntimeError: my own mistake" in result.stderr
        assert "fusion_core/" not in result.stderr
        assert result.stdout == ""

    def test_a_function_that_returns_something_else(self, run, tmp_path):
        (tmp_path / "other_app.py").write_text("def step():\n    print('the user speaks')\n    return 3\n")
        result = run("bench", f"{tmp_path}/other_app.py:step", "--json", status=2)
        assert "returned int, needs (model, args)" in result.stderr
        assert "the user speaks" in result.stderr
        assert result.stdout == ""

    def test_a_budget_without_time_leaves_everything_out_and_says_so(self, run):
        result = run("bench", "--shape", "tiny", "--batches", "1,8", "--budget", "0")
        assert "left out, as --budget 0 had no time for it: batch 1, 8" in result.stdout


def test_a_stage_that_hangs_ends_with_every_threads_stack():
    code = (
        "import time\n"
        "from fusion_core.cli.commands.bench import _Progress\n"
        "with _Progress(1) as progress:\n"
        "    with progress.stage('one'): time.sleep(0.7)\n"
        "    with progress.unseen('two'): time.sleep(0.7)\n"
        "    print('still here', flush=True)\n"
        "    with progress.stage('three'): time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert done.stdout == "still here\n"
    assert "Timeout" in done.stderr
    assert "line 7" in done.stderr
