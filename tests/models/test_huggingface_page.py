"""Each program of ``docs/huggingface.md`` prints what the page shows, and the tokens that it generates without fusion.

All but the README's program, which is the page's first one and runs in `tests/test_readme.py`, are the nightly run's:
`test_decode.py` has ``dynamic=True`` and a cache, `tests/merging/test_adapters.py` LoRA's sums.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models import programs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "huggingface"
PAGE = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
SHOWN = dict(
    re.findall(r"^<!-- include: \.\./examples/huggingface/(\w+)\.py -->\n.*?^```text\n(.*?)^```$", PAGE, re.M | re.S)
)
PROGRAMS = [*SHOWN]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for program in ("small_model", "small_fp8"):
        subprocess.run([sys.executable, str(FOLDER / f"{program}.py"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """Fresh processes: a program's reports are those of its process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with WorkerPool(2, timeout=540.0) as pool:
        yield pool


def test_every_program_of_the_folder_is_on_the_page():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*PROGRAMS, "small_model", "small_fp8"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_prints_what_the_page_shows_and_generates_as_without_fusion(pool: WorkerPool, model: Path, name: str):
    eager = pool.run(programs.run, FOLDER / f"{name}.py", [str(model)], True)[0]
    fused = pool.run(programs.run, FOLDER / f"{name}.py", [str(model)])[0]
    assert_same_tokens(texts(fused), texts(eager), model, adapter=name == "lora")
    assert patterns(fused) == patterns(SHOWN[name])
    assert texts(SHOWN[name]) == texts(fused)


@pytest.mark.parametrize("mode", ["default", "max-autotune", "max-autotune-no-cudagraphs"])
def test_each_mode_generates_as_without_fusion(pool: WorkerPool, model: Path, mode: str):
    program = FOLDER / "static_cache.py"
    eager = pool.run(programs.run, program, [str(model), mode], True)[0]
    fused = pool.run(programs.run, program, [str(model), mode])[0]
    assert_same_tokens(texts(fused), texts(eager), model)
    assert patterns(fused) == patterns(SHOWN["static_cache"])


def test_a_checkpoint_in_fp8_with_a_scale_for_each_block_runs_as_bfloat16(pool: WorkerPool, model: Path):
    folder = model / "fine_grained"
    eager = pool.run(programs.run, FOLDER / "static_cache.py", [str(folder)], True)[0]
    fused = pool.run(programs.run, FOLDER / "static_cache.py", [str(folder)])[0]
    assert_same_tokens(texts(fused), texts(eager), folder)
    assert patterns(fused) == patterns(SHOWN["static_cache"])


@pytest.mark.parametrize(
    ("folder", "config", "words"),
    [
        (".", "fine-grained", "RuntimeError: No GPU or XPU found. A GPU or XPU is needed for FP8 quantization."),
        (".", "torchao", "Float8 dynamic quantization requires CUDA compute capability ≥8.9 or MI300+ or XPU."),
        ("compressed_tensors", "dequantized", "The size of tensor a (64) must match the size of tensor b (0)"),
    ],
)
def test_how_loading_other_kinds_of_fp8_ends(pool: WorkerPool, model: Path, folder: str, config: str, words: str):
    ends = pool.run(programs.failure, model / folder, config)
    assert any(words in end for end in ends), ends
    assert words in PAGE


def test_compressed_tensors_end_at_the_first_call(model: Path):
    """In processes of their own: they leave the ranks waiting for each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "static_cache.py"), str(model / "compressed_tensors")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    words = "AttributeError: 'function' object has no attribute '__func__'"
    assert ran.returncode != 0
    assert words in ran.stderr
    assert words in PAGE


def texts(printed: str) -> list[str]:
    """The lines of words."""
    return [line for line in printed.splitlines() if re.fullmatch(r"[a-z]{3}( [a-z]{3})+", line)]


def patterns(printed: str) -> list[list[str]]:
    """The patterns of each line that has any."""
    return [found for line in printed.splitlines() if (found := re.findall(r"\ball_reduce\w*_rms_norm\b", line))]


def assert_same_tokens(fused: list[str], eager: list[str], model: Path, adapter: bool = False) -> None:
    """That texts are the same up to the first token at which two logits tie within a rounding of bfloat16."""
    assert len(fused) == len(eager) > 0
    for ours, theirs in zip(fused, eager, strict=True):
        words, others = ours.split(), theirs.split()
        assert len(words) == len(others)
        for place, (one, other) in enumerate(zip(words, others, strict=True)):
            if one == other:
                continue
            logits = programs.exact_logits(model, " ".join(words[:place]), adapter)
            tied = logits[[programs.token(model, one), programs.token(model, other)]]
            assert tied.diff().abs() <= torch.finfo(torch.bfloat16).eps * tied.abs().max(), (ours, theirs, tied)
            break
