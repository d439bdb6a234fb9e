"""``fusion-core tune --collective vllm`` where vLLM is installed: its own all_reduce is a base line of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm_lab") is None, reason="needs vLLM and the lab: `make test-vllm` installs both"
)

ADD = "all_reduce_add_rms_norm"
VLLM = "unfused vllm::all_reduce"


def test_vllm_s_all_reduce_has_times_of_its_own(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    arguments = ["tune", "--collective", "vllm", "--patterns", f"{ADD},all_reduce", "--hidden", "256"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fusion_core", *arguments]
    command += ["--tokens", "1,64", "--order", "lab", "--output", str(table), "--json"]
    variables = {"VLLM_LAB": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert {(row["pattern"], row["tokens"]) for row in rows} == {(p, n) for p in (ADD, "all_reduce") for n in (1, 64)}
    for row in rows:
        assert row["us"].keys() >= {"unfused", VLLM, f"lab.{row['pattern']}"}
    found = json.loads(done.stdout)
    assert {each["base_line"] for each in found["crossovers"]} == {"unfused", VLLM}
