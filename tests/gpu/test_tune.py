"""``fusion-core tune`` on real GPUs, a few sizes of it."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [pytest.mark.cuda(devices=2), pytest.mark.slow]

ADD = "all_reduce_add_rms_norm"
MULTICAST_OFF = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1"}


def test_a_small_table(tmp_path):
    ranks = "4" if torch.cuda.device_count() >= 4 else "2"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    command += ["-m", "fusion_core", "tune", "--patterns", f"{ADD},{ADD}_static_fp8,all_reduce,all_reduce_rms_norm"]
    command += ["--hidden", "4096", "--tokens", "1,64,4096", "--budget", "240", "--json"]
    environment = {**os.environ, **MULTICAST_OFF, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=560)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout)
    rows = {(row["pattern"], row["tokens"]): row["us"] for row in answer["table"]["rows"]}
    assert len(rows) == 12
    broken = [note for note in answer["notes"] if note["why"].startswith("rank ")]
    assert broken == []
    for (pattern, tokens), us in rows.items():
        assert {"reference.symm_mem_one_shot", "reference.symm_mem_two_shot"} <= us.keys(), (pattern, tokens)
        assert all(2.0 < time < 5000.0 for time in us.values()), us
    assert all(rows[ADD, 1][name] < rows[ADD, 4096][name] for name in rows[ADD, 1])
