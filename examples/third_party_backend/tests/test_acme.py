"""The backend end to end: a compiled model's report, and its numbers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fusion_core

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    """The module model.py, in a process group of one rank."""
    spec = importlib.util.spec_from_file_location("model", HERE / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield module
    dist.destroy_process_group()


def test_both_places_of_the_model_run_on_acme(model):
    assert model.run() < 1e-5
    sites = [(site.pattern, site.strategy) for site in fusion_core.last_report().sites]
    assert sites == [
        ("all_reduce_add_rms_norm", "acme.rms_norm"),
        ("all_reduce_add_dynamic_tanh", "acme.dynamic_tanh"),
    ]


def test_a_size_that_the_kernels_do_not_take_is_refused_with_the_reason(model):
    assert model.run(size=20) < 1e-5
    report = fusion_core.last_report()
    assert [site.strategy for site in report.sites] == ["reference.all_reduce_add_rms_norm", "reference.all_reduce"]
    for site, name in zip(report.sites, ("acme.rms_norm", "acme.dynamic_tanh"), strict=True):
        (decision,) = [decision for decision in site.decisions if decision.strategy == name]
        assert [str(reason) for reason in decision.reasons] == ["x.shape[-1] is 20, needs a multiple of 8"]


def test_the_eager_function_of_a_core_pattern_runs_on_acme(model):
    x, weight = torch.ones(2, 8), torch.ones(8)
    config = fusion_core.FusionConfig(order=("acme",))
    normed, residual = fusion_core.ops.all_reduce_add_rms_norm(x, x, weight, 1e-6, config=config)
    torch.testing.assert_close(residual, 2 * x)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(2 * x, (8,), weight, 1e-6))


def test_loading_the_backend_leaves_the_kernel_library_alone():
    program = "import sys, fusion_core; fusion_core.Registry.load(); sys.exit('fusion_acme.kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False).returncode == 0


def test_on_two_ranks_the_program_prints_what_the_documentation_shows(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "model.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    shown = (HERE / "report.txt").read_text(encoding="utf-8")
    assert ran.stdout.startswith(shown), ran.stdout
