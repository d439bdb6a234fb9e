"""The backend end to end: what the program prints, with memory on all ranks and without it on one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent


@pytest.mark.parametrize(("arguments", "report"), [([], "report.txt"), (["1"], "without_memory.txt")])
def test_on_two_ranks_the_program_prints_what_the_documentation_shows(arguments, report, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "model.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [*command, *arguments], cwd=HERE, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    shown = (HERE / report).read_text(encoding="utf-8")
    assert ran.stdout.startswith(shown), ran.stdout
    difference = float(ran.stdout.rpartition(":")[2])
    assert difference < 1e-5, "the model's answer is the same in both cases"
