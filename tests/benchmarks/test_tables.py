import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    return runpy.run_path(str(BENCHMARKS / "tables.py"))


def row(us, **more):
    return {"pattern": "all_reduce", "hidden": 64, "tokens": 1, "us": us, "notes": {}, **more}


def test_ratios_are_to_the_chosen_kernel_the_better_one_and_nccl(tables):
    us = {"nccl_inductor": 10.0, "flashinfer_one_shot": 5.0, "flashinfer_two_shot": 4.0, "fusion_core": 6.0}
    record = {"ranks": 2, "rows": [row(us, chosen="flashinfer_one_shot")], "overhead": [], "left_out": []}
    last = tables["site_latency"](record).splitlines()[-1]
    assert last == "| 1 | 10.0 | – | 5.0 | 4.0 | 6.0 | one-shot | 1.20 | 1.50 | 0.60 |"


def test_a_column_that_failed_is_a_dash(tables):
    record = {"ranks": 2, "rows": [row({"fusion_core": 6.0})], "overhead": [], "left_out": []}
    assert tables["site_latency"](record).endswith("| 1 | – | – | – | – | 6.0 | – | – | – | – |")


def test_a_decode_step_by_other_tables_stands_beside_the_plain_and_the_fused_one(tables):
    strategies = {"all_reduce: flashinfer.all_reduce": 2}
    step = {"batch": 8, "plain_us": 1100.0, "fused_us": 1000.0, "gain": 1.1, "gain_by_round": [1.09, 1.11]}
    step |= {"sites": 2, "fused_sites": 2, "logits": {"largest_over_largest_logit": 0.01}}
    step |= {"beside": {"bare.json": {"us": 1048.0, "gain": 1.05, "strategies": strategies}}}
    record = {"layers": 1, "ranks": 2, "rows": [step], "left_out": [32]}
    text = tables["decode_step"](record)
    assert "| 8 | 1100.0 | 1000.0 | 1.100× | 1.090–1.110 | 2 of 2 | 0.010 |" in text
    assert "| 8 | bare.json | 1048.0 | 1.050× | `all_reduce: flashinfer.all_reduce` |" in text
    assert text.endswith("Left out for want of time: batch [32].")
    del step["beside"]  # a record of a run without --beside
    assert "other tables" not in tables["decode_step"](record)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["site_latency.py", "decode_step.py"])
def test_without_a_gpu_the_program_says_so(name):
    found = subprocess.run([sys.executable, BENCHMARKS / name], capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert "found no GPU" in found.stderr


def test_where_multicast_is_on_nothing_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    script = [sys.executable, BENCHMARKS / "site_latency.py"]
    found = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert found.stderr == "NCCL_NVLS_ENABLE is '1', needs '0': NVLink multicast has to stay off\n"
