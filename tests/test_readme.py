"""The README shows what the code does: its program, its report, its table, its words."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.huggingface import small_model
from fusion_core import FusionConfig, Registry
from fusion_core.plugins.support_table import support_table
from fusion_core.workers import WorkerPool
from tests.models import programs

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "examples" / "hugging_face.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def in_workers(model: Path) -> str:
    with WorkerPool(2, timeout=400.0) as pool:
        eager = pool.run(programs.run, PROGRAM, [str(model)], True)[0]
        fused = pool.run(programs.run, PROGRAM, [str(model)])[0]
    assert fused.splitlines()[0] == eager.splitlines()[0]  # the same words as without fusion
    return fused


def by_torchrun(model: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--local-ranks-filter", "0", str(PROGRAM), str(model)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_program_is_the_example_that_runs() -> None:
    assert blocks("python")[0] == PROGRAM.read_text(encoding="utf-8")


def test_the_support_table_is_printed_from_the_requirements() -> None:
    core = Registry.load(FusionConfig(order=("aiter", "flashinfer", "reference")))
    assert support_table(core) in (ROOT / "docs" / "support.md").read_text(encoding="utf-8")


def test_every_variable_it_names_is_one() -> None:
    default = FusionConfig()
    for name, value in re.findall(r"`(FUSION_CORE_[A-Z_]+)=([^`]*)`", README):
        os.environ[name] = value
        try:
            assert FusionConfig() != default, name
        finally:
            del os.environ[name]


def test_every_config_it_shows_can_be_made() -> None:
    shown = re.findall(r"`(FusionConfig\(.*?\))`", README)
    assert len(shown) >= 4
    for text in shown:
        assert isinstance(eval(text, {"FusionConfig": FusionConfig}), FusionConfig)


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "start",
    # torchrun starts two interpreters; the pool forks its workers, which have made their imports
    [in_workers, pytest.param(by_torchrun, marks=pytest.mark.nightly)],
)
def test_the_first_program_prints_what_the_readme_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[Path], str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small_model.save(tmp_path / "model")
    printed = start(tmp_path / "model").splitlines()
    shown = blocks("text")[0].splitlines()
    assert printed[:8] == shown[:8]
